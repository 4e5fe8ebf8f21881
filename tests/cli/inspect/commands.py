"""Calls of `lumiere inspect`."""

from typing import Any

from tests.cli.commands import invoke, read_json


def shown(name: str, *options: str) -> dict[str, Any]:
    """Return the JSON of a command that must succeed."""
    return read_json("inspect", name, *options)


def printed(name: str, *options: str) -> list[str]:
    """Return the lines that a command prints, which must fit 80 columns; receipts may be wider."""
    lines = invoke("inspect", name, *options).stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith("receipt")) <= 80
    return lines


def words(name: str, *options: str) -> str:
    """Return what a command prints, without line breaks."""
    return " ".join(" ".join(printed(name, *options)).split())
