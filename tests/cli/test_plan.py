"""`lumiere train --plan`: what it prints, and that it leaves nothing behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from lumiere.config.schema import RunConfig
from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.runs import Run
from lumiere.training import estimate
from tests.cli.commands import invoke


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.05)


def planned(trained_run: Run, *options: str) -> str:
    """The stdout of a plan of the trained run's config, which makes nothing."""
    result = invoke("train", str(trained_run.config_path), "--plan", *options)
    assert list(Path.cwd().iterdir()) == [], "no run is made, and no runs directory"
    assert "nothing is written" in result.stderr
    return result.stdout


def test_as_json(trained_run: Run, tiny_corpus: TokenizedCorpus, tiny_config: RunConfig) -> None:
    shown = json.loads(planned(trained_run, "--json", "--set", "training.snapshots=false"))
    size = trained_run.record.num_parameters or 0
    assert shown["num_parameters"] == size == sum(shown["parameters"].values())
    assert shown["disk_bytes"] == 4 * 12 * size
    assert shown["disk_free_bytes"] > 0
    assert (shown["total_steps"], shown["num_evaluations"]) == (12, 3)
    times = shown["startup_seconds"] + 12 * shown["seconds_per_step"] + 3 * shown["seconds_per_evaluation"]
    assert shown["total_seconds"] == pytest.approx(times)
    windows = tiny_corpus.windows("train", tiny_config)
    lengths = windows.lengths(np.arange(len(windows)))
    padding = 1 - (lengths - 1).sum() / (len(windows) * tiny_config.model.context_size)
    assert shown["padding_share"] == pytest.approx(padding)
    assert shown["mfu"] == pytest.approx(shown["tokens_per_second"] * shown["flops_per_token"] / shown["peak_flops"])


def test_in_words(trained_run: Run) -> None:
    size = trained_run.record.num_parameters
    lines = planned(trained_run, "--max-steps", "500", "--set", "training.patience=2").splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line[:17].strip(): line[17:].strip() for line in lines if not line.startswith(" ")}
    assert list(rows) == ["parameters", "FLOPs per token", "memory", "disk", "speed", "steps", "time"]
    assert rows["parameters"] == f"{size:,}"
    assert rows["steps"].startswith("500 ")
    parts = [line.split()[0] for line in lines if line.startswith(" ")]
    assert parts[:5] == ["token", "positions", "attention", "feed-forward", "norms"]
    (early,) = (line for line in lines if "patience (2)" in line)
    shown = json.loads(planned(trained_run, "--json"))
    assert early.split()[2] == str(3 * shown["epoch_steps"])
    (padding,) = (line for line in lines if line.startswith("  padding"))
    assert padding.split()[1] == f"{shown['padding_share']:.1%}"


def test_a_warm_up_that_training_never_ends_is_said(trained_run: Run) -> None:
    command = ["train", str(trained_run.config_path), "--plan", "--json", "--max-steps", "10"]
    for warmup, is_said in (("10", False), ("11", True)):
        options = ["--set", f"training.warmup_steps={warmup}"]
        result = invoke(*command, *options)
        assert json.loads(result.stdout)["warmup_steps"] == int(warmup)
        assert ("training.warmup_steps" in result.stderr) == is_said
        assert ("91%" in result.stderr) == is_said
