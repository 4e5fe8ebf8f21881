"""Untyped on purpose: reading all models of transformers took 15 of the 52 seconds of the type check."""

from typing import Any

def __getattr__(name: str) -> Any: ...
