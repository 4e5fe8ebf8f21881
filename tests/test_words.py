"""All help pages and messages in one golden file, so that a change of words is one diff to review."""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import lumiere
from lumiere import errors
from lumiere.cli import app

PACKAGE = Path(lumiere.__file__).parent
HEADER = "Every help page and message. After a change of words: pytest tests/test_words.py --update-golden\n"
ERRORS = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
NOTES = {"show_note", "show_warning", "warn", "WarningEvent"}


def test_help_pages_and_messages(golden: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    for variable in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(variable, raising=False)
    sections = [HEADER, *help_pages(typer.main.get_command(app), []), *messages()]
    computed = "\n".join(sections)
    assert computed == golden("words.txt", computed)


def help_pages(command: Any, path: list[str]) -> Iterator[str]:
    """The help page of a command and of all its subcommands."""
    page = CliRunner().invoke(app, [*path, "--help"], catch_exceptions=False).stdout
    yield f"===== lumiere {' '.join([*path, '--help'])}\n" + "".join(f"{line.rstrip()}\n" for line in page.splitlines())
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from help_pages(subcommand, [*path, name])


def messages() -> Iterator[str]:
    """The errors with their hints, then the notes and warnings, each sorted by their text."""
    found: dict[str, set[str]] = {"errors": set(), "notes and warnings": set()}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = assigned_texts(tree)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function = getattr(call.func, "id", getattr(call.func, "attr", ""))
            texts = [*call.args, *(keyword.value for keyword in call.keywords)]
            if function in ERRORS and texts:
                found["errors"].add("\n  hint: ".join(template(text, names) for text in texts[:2]))
            elif function in NOTES and texts:
                found["notes and warnings"].add(template(texts[-1], names))
    for title, lines in found.items():
        known = sorted(line for line in lines if line.replace("{…}", ""))
        yield f"===== {title}\n" + "".join(f"{line}\n" for line in known)


def assigned_texts(tree: ast.Module) -> dict[str, str]:
    """The texts that a file assigns to a name, several of them with bars between."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = template(node.value, {})
            if text != "{…}":
                found.setdefault(node.targets[0].id, set()).add(text)
    return {
        name: "{" + " | ".join(sorted(texts)) + "}" if len(texts) > 1 else min(texts) for name, texts in found.items()
    }


def template(node: ast.expr, names: dict[str, str]) -> str:
    """The text that an expression stands for, with {…} for each value that only a run knows."""
    match node:
        case ast.Constant(value=None):
            return ""
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(template(part.value if isinstance(part, ast.FormattedValue) else part, {}) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left, names) + template(right, names)
        case ast.IfExp(body=body, orelse=other):
            return "{" + template(body, names) + " | " + template(other, names) + "}"
        case ast.Name(id=name) if name in names:
            return names[name]
        case _:
            return "{…}"
