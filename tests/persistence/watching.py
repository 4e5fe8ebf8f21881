"""Looks at a folder around every system call that changes it, where a kill may come."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def watch(monkeypatch: pytest.MonkeyPatch, functions: Sequence[str], look: Callable[[], None]) -> list[str]:
    """Calls `look` before and after each of these functions of `os`; the list names those that were called."""
    calls: list[str] = []
    for function in functions:
        real = getattr(os, function)

        def call(*arguments: Any, real: Any = real, function: str = function, **options: Any) -> None:
            look()
            calls.append(function)
            real(*arguments, **options)
            look()

        monkeypatch.setattr(os, function, call)
    return calls
