"""`lumiere runs card`: the card of a run, on stdout or in a file."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.persistence.runs import Run, RunStore
from tests.checkpoints import remove_pointers

FIGURES = "## Validation results"


def card(*arguments: str) -> tuple[str, str]:
    """What the command prints on stdout and on stderr."""
    result = CliRunner().invoke(app, ["runs", "card", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_the_card_takes_the_figures_that_training_left(trained_run: Run) -> None:
    text, talk = card(trained_run.id, "--runs-dir", str(trained_run.path.parent))
    assert talk == ""
    assert text.startswith("---\n")
    assert f"# Lumiere {trained_run.id}" in text
    best = trained_run.record.best_evaluation
    assert f"| Mean batch perplexity | {best['mean_batch_perplexity']:,.2f} |" in text
    assert f"| Batches | {best['num_batches']} | of 8 windows" in text


@pytest.fixture
def older_run(trained_run: Run) -> Run:
    """A run of before trainings left their evaluation."""
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    run = RunStore().open("latest")
    record = run.record.to_json()
    del record["best_evaluation"], record["splits"]
    run.record_path.write_text(json.dumps(record))
    return run


def test_an_older_run_is_evaluated_once_and_that_is_said(trained_run: Run, older_run: Run) -> None:
    text, talk = card("latest")
    assert talk.splitlines() == [f"run {older_run.id} has no evaluation of checkpoint best; evaluating it now"]
    whole, _ = card("latest", "--runs-dir", str(trained_run.path.parent))
    results = [page.split(FIGURES)[1].split("\n## ")[0] for page in (text, whole)]
    assert results[0] == results[1]


def test_a_run_that_was_killed_early_has_a_card_of_latest(older_run: Run) -> None:
    remove_pointers(older_run, "best")
    text, _ = card("latest")
    assert "checkpoint `latest` (step 12)" in text
    assert f'load_checkpoint("{older_run.name}", "latest")' in text


def test_a_file_is_written_whole_and_replaced_only_by_force(trained_run: Run) -> None:
    runs_dir = str(trained_run.path.parent)
    printed, _ = card("latest", "--runs-dir", runs_dir)
    text, talk = card("latest", "--runs-dir", runs_dir, "-o", "README.md")
    assert (text, talk) == ("", "wrote README.md\n")
    assert Path("README.md").read_text(encoding="utf-8") == printed
    Path("README.md").write_text("mine")
    card("latest", "--runs-dir", runs_dir, "-o", "README.md", "--force")
    assert Path("README.md").read_text(encoding="utf-8") == printed
    assert [path.name for path in Path().iterdir()] == ["README.md"]
