"""Calls of `lumiere inspect`; a file of tests makes its own of them by `functools.partial`."""

import json
from typing import Any

from typer.testing import CliRunner, Result

from lumiere.cli import app


def inspect(name: str, *options: str) -> Result:
    """`lumiere inspect NAME OPTIONS`, whatever comes of it."""
    return CliRunner().invoke(app, ["inspect", name, *options])


def inspect_json(name: str, *options: str) -> dict[str, Any]:
    """What it prints for scripts, if it succeeds."""
    result = inspect(name, *options, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
