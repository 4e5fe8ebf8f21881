"""`lumiere inspect dynamics`: what it prints, writes and refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumiere.cli.inspect.dynamics import ruler
from lumiere.interpret.dynamics import DEFAULT_METRICS
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from tests.cli.inspect.commands import inspect, inspect_json

STEPS = [0, 1, 2, 4, 8]
PAIRS = ["L0H0>L1H0", "L0H0>L1H1", "L0H1>L1H0", "L0H1>L1H1"]


def shown(*options: str, name: str = "dynamics") -> dict[str, Any]:
    return inspect_json(name, *options)


def values(result: dict[str, Any], metric: str, place: str = "") -> list[float | None]:
    return result["values"][list(zip(result["metrics"], result["places"], strict=True)).index((metric, place))]


def test_by_default(runs_dir: str) -> None:
    result = shown("--runs-dir", runs_dir)
    assert result["steps"] == STEPS
    assert list(dict.fromkeys(result["metrics"])) == list(DEFAULT_METRICS)
    assert [
        place for metric, place in zip(result["metrics"], result["places"], strict=True) if "comp" in metric
    ] == PAIRS
    assert result["checkpoint"] == "step-00000008"
    assert result["step"] == 8
    assert result["source"].startswith(
        "5 snapshots, steps 0 to 8; 32 sequences of 7 random tokens of the training split, twice (seed 0); "
    )
    assert "windows of the validation split of stories (seed 0)" in result["source"]
    assert result["curve_steps"][-1] == 12
    assert all(receipt["holds"] for receipt in result["receipts"])


@pytest.mark.parametrize("step", STEPS)
def test_each_snapshot_has_the_numbers_of_heads(step: int, runs_dir: str) -> None:
    alone = shown("--runs-dir", runs_dir, "--checkpoint", str(step), name="heads")
    column = STEPS.index(step)
    metrics = ("induction", "repeat-gap", "in-context-score", "text-induction", "text-repeat-gap")
    along = shown("--runs-dir", runs_dir, *(word for metric in metrics for word in ("-m", metric)))
    for layer, head in np.ndindex(2, 2):
        number = alone["score_names"].index("induction")
        assert values(along, "text-induction", f"L{layer}H{head}")[column] == alone["text_scores"][layer][head][number]
        assert values(along, "induction", f"L{layer}H{head}")[column] == alone["scores"][layer][head][number]
    assert values(along, "repeat-gap")[column] == alone["repeat_gap"]
    assert values(along, "in-context-score")[column] == alone["in_context_score"]
    assert values(along, "text-repeat-gap")[column] == alone["text_gap"]


def test_a_text_takes_the_place_of_random_tokens(runs_dir: str) -> None:
    along = shown("--runs-dir", runs_dir, "-m", "previous", "--prompt", "aa aa")
    alone = shown("--runs-dir", runs_dir, "-c", "4", "--prompt", "aa aa", name="heads")
    assert along["token_ids"] == alone["token_ids"]
    assert values(along, "previous", "L1H0")[3] == alone["scores"][1][0][0]
    assert set(along["metrics"]) == {"previous"}


def test_metrics_come_once_and_in_their_order(runs_dir: str) -> None:
    result = shown("--runs-dir", runs_dir, "-m", "norm", "-m", "copying", "-m", "norm")
    assert list(dict.fromkeys(result["metrics"])) == ["norm", "copying"]
    assert len(result["metrics"]) == len(set(zip(result["metrics"], result["places"], strict=True)))


def test_every_second_snapshot_and_the_last(runs_dir: str) -> None:
    assert shown("--runs-dir", runs_dir, "-m", "norm", "--every", "3")["steps"] == [0, 4, 8]
    assert shown("--runs-dir", runs_dir, "-m", "norm", "--every", "99")["steps"] == [0, 8]


def test_the_view_fits_80_columns(runs_dir: str) -> None:
    result = inspect("dynamics", "--runs-dir", runs_dir, "--top-k", "1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith("receipt")) <= 80
    for metric in DEFAULT_METRICS:
        assert any(line.startswith(f"{metric}: ") for line in lines)
    assert sum("that changed less" in line for line in lines) == 4
    assert "snapshots, steps 0 to 8" in result.stdout
    numbers = shown("--runs-dir", runs_dir)
    loss = values(numbers, "validation-loss")
    assert f"{loss[0]:>7.2f} {loss[-1]:>7.2f}" in result.stdout


def test_pictures_and_the_page_that_answers_keys(runs_dir: str) -> None:
    for suffix in ("svg", "png", "html"):
        assert inspect("dynamics", "--runs-dir", runs_dir, "-m", "induction", "-o", f"out.{suffix}").exit_code == 0
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert "induction (share)" in Path("out.svg").read_text()
    page = Path("out.html").read_text()
    assert 'addEventListener("keydown"' in page
    assert page.count("<output data-series=") == 4


def test_without_the_corpus_it_goes_on_and_says_so(
    trained_run: Run, runs_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(trained_run), "record", RunRecord(corpus_sha256="another"))
    result = inspect("dynamics", "--runs-dir", runs_dir, "--json")
    assert result.exit_code == 0, result.output
    assert "without validation-loss, in-context-score, text-repeat-gap, text-induction: the corpus" in result.stderr
    on_text = {"validation-loss", "in-context-score", "text-repeat-gap", "text-induction"}
    assert set(json.loads(result.stdout)["metrics"]) == set(DEFAULT_METRICS) - on_text
    # Who asks for it by name is told.
    asked = inspect("dynamics", "--runs-dir", runs_dir, "-m", "lens-depth")
    assert asked.exit_code == 2
    assert "the corpus 'stories' is not the one" in asked.stderr


def test_a_run_without_snapshots_is_refused(trained_run: Run, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained_run.path.parent, runs)
    shutil.rmtree(runs / trained_run.name / "checkpoints" / "snapshots")
    result = inspect("dynamics", "--runs-dir", str(runs))
    assert result.exit_code == 2
    assert f"run {trained_run.id} has no snapshots" in result.stderr
    assert len(result.stderr.splitlines()) == 2


def test_a_damaged_snapshot_is_refused(trained_run: Run, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained_run.path.parent, runs)
    (path,) = runs.glob("*/checkpoints/snapshots/step-00000002/model.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    result = inspect("dynamics", "--runs-dir", str(runs), "-m", "norm", "-o", str(tmp_path / "a.json"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert not (tmp_path / "a.json").exists()


def test_the_ruler_stands_above_its_columns() -> None:
    steps = [0, 1, 2, 4, 8, 16, 1024, 2048, 4096]
    text = ruler(steps)
    assert text == "0  4  1,024"
    for column in (0, 3, 6):
        assert text[column:].startswith(f"{steps[column]:,}")
