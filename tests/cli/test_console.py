"""What a terminal is taken to show."""

import io

import pytest
from rich.console import Console

from lumiere.cli import console


@pytest.mark.parametrize(
    ("is_terminal", "settings", "expected"),
    [
        (False, {}, "none"),
        (True, {"color_system": "truecolor"}, "many"),
        (True, {"color_system": "256"}, "many"),
        (True, {"color_system": "standard"}, "few"),
        (True, {"color_system": None}, "few"),
        (True, {"color_system": "truecolor", "no_color": True}, "few"),
    ],
)
def test_color_support(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, settings: dict[str, str | bool | None], expected: str
) -> None:
    stdout = Console(file=io.StringIO(), force_terminal=is_terminal, _environ={}, **settings)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(console, "stdout", lambda: stdout)
    assert console.color_support() == expected
