"""Calls of the command line in this process."""

import json
from typing import Any

from typer.testing import CliRunner, Result

from lumiere.cli import app


def invoke(*arguments: str, text: str | bytes | None = None, code: int = 0) -> Result:
    """Run a command that must exit with `code`; `text` is its stdin."""
    result = CliRunner().invoke(app, arguments, input=text, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def stdout_of(*arguments: str, text: str | bytes | None = None) -> str:
    return invoke(*arguments, text=text).stdout


def read_json(*arguments: str, text: str | bytes | None = None) -> Any:
    return json.loads(stdout_of(*arguments, "--json", text=text))


def refuse(*arguments: str, text: str | bytes | None = None, after_notes: bool = False) -> tuple[str, str]:
    """Run a command that must be refused, and return its error and its hint: two lines that steer no terminal."""
    result = invoke(*arguments, text=text, code=2)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert after_notes or len(lines) == 2, result.stderr
    error, hint = lines[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert result.stderr.replace("\n", "").isprintable()
    return error, hint
