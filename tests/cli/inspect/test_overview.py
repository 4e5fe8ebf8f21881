"""`lumiere inspect` alone: every analysis is listed, with its question and what its answer is worth."""

import pytest
import typer
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.cli.inspect import ENTRIES
from lumiere.cli.inspect import app as inspect_app


@pytest.fixture
def lines() -> list[str]:
    result = CliRunner().invoke(app, ["inspect"])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_every_command_is_listed(lines: list[str]) -> None:
    names = list(typer.main.get_command(inspect_app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    listed = [line.split()[0] for line in lines[: 2 * len(ENTRIES) : 2]]
    assert listed == names == [entry.command.__name__ for entry in ENTRIES]
    assert len(set(names)) == len(names)


def test_each_has_its_question_its_worth_and_its_cost(lines: list[str]) -> None:
    for number, entry in enumerate(ENTRIES):
        first, second = lines[2 * number : 2 * number + 2]
        assert entry.question in first
        assert first.endswith(f" {entry.cost}")
        assert second.strip() == entry.establishes
        assert entry.question.endswith("?") or entry.command.__name__ == "report"
    assert "Where does each head look?" in lines[2]
    assert "not what it does there" in lines[3]


def test_it_fits_the_terminal(lines: list[str]) -> None:
    assert max(map(len, lines)) <= 80
