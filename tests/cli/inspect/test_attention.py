"""`inspect attention`: its kinds, and how much of them it shows."""

from functools import partial
from importlib import import_module

import pytest

from lumiere.cli.inspect.attention import KINDS
from tests.cli.inspect.commands import inspect, inspect_json

inspect_attention = partial(inspect, "attention")
shown = partial(inspect_json, "attention")

PROMPT = ("--prompt", "One day a fox")


@pytest.fixture(params=["many", "few"])
def shown_colours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A terminal that shows so many colours."""
    # The package's attribute of that name is the command, not the module.
    for name in ("lumiere.cli.inspect.attention", "lumiere.cli.terminal_plots"):
        monkeypatch.setattr(import_module(name), "color_support", lambda: request.param)
    return request.param


def test_the_default_is_a_line_a_head_and_thumbnails(runs_dir: str, shown_colours: str) -> None:
    lines = inspect_attention("--runs-dir", runs_dir).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("L0H0", "L0H1", "L1H0", "L1H1"):
        assert len([line for line in lines if line.startswith(name)]) >= 1
    assert any(line.startswith("uniform") for line in lines)
    assert any(line.split() == ["L0H0", "L0H1", "L1H0", "L1H1"] for line in lines)
    assert any(line.startswith("largest share in a cell: ") for line in lines)
    assert len(lines) < 40


def test_one_head_is_drawn_whole(runs_dir: str, shown_colours: str) -> None:
    printed = inspect_attention("--runs-dir", runs_dir, "--layer", "1", "--head", "0", *PROMPT).stdout
    assert f"<|sot|> {'██' if shown_colours == 'many' else '███'}\n" in printed
    assert "L1H1" not in printed


def test_a_pipe_gets_the_numbers(runs_dir: str) -> None:
    expected = shown("--runs-dir", runs_dir, "--layer", "1", "--head", "0", *PROMPT)
    lines = inspect_attention("--runs-dir", runs_dir, "--layer", "1", "--head", "0", *PROMPT).stdout.splitlines()
    table = [line.split("\t") for line in lines if "\t" in line]
    assert table[0] == ["", *expected["token_labels"]]
    assert [row[0] for row in table[1:]] == expected["token_labels"]
    for number, row in enumerate(table[1:]):
        weights = expected["patterns"][0][0][number][: number + 1]
        assert row[1:] == [f"{weight:.3f}" for weight in weights]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_the_terminal_and_verifies(runs_dir: str, kind: str) -> None:
    printed = inspect_attention("--runs-dir", runs_dir, "--kind", kind, "--verify", *PROMPT)
    assert printed.exit_code == 0, printed.output
    assert max(map(len, printed.stdout.splitlines())) <= 80
    result = shown("--runs-dir", runs_dir, "--kind", kind, "--verify", *PROMPT)
    assert result["kind"] == kind
    assert result["receipts"][-1]["law"] == "the same in float64"
    assert all(receipt["holds"] for receipt in result["receipts"])


def test_one_token(runs_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text cannot be so short by the options, but a window can."""
    monkeypatch.setattr("lumiere.cli.inspect.inputs.choose_text", lambda *a, **k: ((0,), "one token"))
    for kind in KINDS:
        result = inspect_attention("--runs-dir", runs_dir, "--kind", kind)
        assert result.exit_code == 0, result.output
    assert shown("--runs-dir", runs_dir)["mean_distance"] == [[None, None]] * 2
