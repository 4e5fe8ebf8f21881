"""`lumiere inspect summary`: what it shows, writes and refuses."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from lumiere.data.dataset import TokenizedCorpus
from lumiere.errors import LumiereError
from lumiere.interpret.summary import measure_activity
from lumiere.persistence.runs import Run
from tests.cli.inspect.commands import inspect, inspect_json

OWN_KEYS = {
    *("parameters", "matrices", "shapes", "norms", "rms", "spectral_norms", "stable_ranks", "effective_ranks"),
    *("gain_names", "gains", "token_norms", "token_mean_share", "position_norms", "position_cosine", "num_windows"),
    *("num_tokens", "writes", "head_writes", "largest_activations", "checks", "receipts", "source"),
}


def inspect_summary(runs_dir: str, *options: str) -> Result:
    return inspect("summary", "--runs-dir", runs_dir, *options)


def shown(runs_dir: str, *options: str) -> dict[str, Any]:
    return inspect_json("summary", "--runs-dir", runs_dir, *options)


def test_json(runs_dir: str, trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    result = shown(runs_dir, "--windows", "5", "--seed", "1")
    assert result.keys() > OWN_KEYS
    assert "token_ids" not in result
    assert sum(result["parameters"].values()) == trained_run.load_model("best").num_parameters
    assert result["num_windows"] == 5
    total = len(tiny_corpus.windows("validation", trained_run.load_config()))
    assert result["source"] == f"5 of {total:,} windows of the validation split of stories (seed 1), in 1 batch"
    assert np.shape(result["largest_activations"]) == (2, 32)
    never = {check["what"]: check for check in result["checks"]}["tokens that were never met in training"]
    counts = np.bincount(tiny_corpus.splits["train"].ids, minlength=320)
    assert never["places"] == [str(token) for token in np.flatnonzero(counts == 0)]
    assert all(check["threshold"] for check in result["checks"])


def test_windows_are_drawn_by_the_seed(runs_dir: str) -> None:
    one, same, other = (shown(runs_dir, "--windows", "5", "--seed", seed)["writes"] for seed in "112")
    assert one == same != other


def test_what_is_shown_are_the_numbers(runs_dir: str) -> None:
    numbers = shown(runs_dir)
    text = inspect_summary(runs_dir).stdout
    assert max(len(line) for line in text.splitlines() if not line.startswith("receipt")) <= 80
    assert f"{sum(numbers['parameters'].values()):,}" in text
    gate = numbers["effective_ranks"][numbers["matrices"].index("blocks.1.feedforward.gate.weight")]
    row = next(line for line in text.splitlines() if line.startswith("  L1"))
    assert row.split()[5] == f"{gate:.1f}"
    for check in numbers["checks"]:
        found = f"{check['count']:,}" if check["count"] else "no"
        verdict = "warning" if check["count"] else "ok"
        assert f"{verdict:8}{found} {check['what']} (" in text
    assert f"{numbers['num_tokens']:,} tokens of {numbers['num_windows']:,}" in " ".join(text.split())


def test_without_windows_or_corpus_the_weights_are_told(runs_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = shown(runs_dir, "--windows", "0")
    assert (weights["num_windows"], weights["writes"]) == (0, None)
    assert "norm of what each part writes" not in inspect_summary(runs_dir, "--windows", "0").stdout

    def gone(*arguments: Any) -> None:
        raise LumiereError("the corpus is gone")

    monkeypatch.setattr(import_module("lumiere.cli.inspect.summary"), "open_corpus", gone)
    result = inspect_summary(runs_dir)
    assert result.exit_code == 0
    assert "the corpus is gone: only the weights are summarized" in " ".join(result.stderr.split())
    assert "never met" not in result.stdout
    assert "weights alone" in result.stdout


def test_more_windows_than_there_are_are_all_of_them(
    runs_dir: str, trained_run: Run, tiny_corpus: TokenizedCorpus
) -> None:
    from lumiere.data.batches import batches_in_order

    windows = tiny_corpus.windows("validation", trained_run.load_config())
    expected, _ = measure_activity(trained_run.load_model("best").eval(), batches_in_order(windows, 32))
    result = shown(runs_dir, "--windows", "100000")
    assert (result["num_windows"], result["num_tokens"]) == (len(windows), expected["num_tokens"])
    np.testing.assert_allclose(result["writes"], expected["writes"], rtol=1e-5)
