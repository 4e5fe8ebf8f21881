"""`lumiere inspect tokens`: the table, the baselines, and what it refuses."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lumiere.data.dataset import TokenizedCorpus
from lumiere.evaluation.ngrams import BigramModel
from lumiere.persistence.runs import Run
from tests.cli.inspect.commands import inspect, inspect_json

pytestmark = pytest.mark.usefixtures("runs_dir")
inspect_tokens = partial(inspect, "tokens")
shown = partial(inspect_json, "tokens")

OWN_KEYS = {"losses", "surprisals", "entropies", "ranks", "predictions", "probabilities", "unigram_losses"}
OWN_KEYS |= {"bigram_losses", "baselines", "token_ids", "token_labels", "receipts"}


def test_baselines_are_of_the_training_split(tiny_corpus: TokenizedCorpus) -> None:
    result = shown("--prompt", "Once upon")
    assert result.keys() >= OWN_KEYS
    assert result["baselines"] == "the run's training split"
    split = tiny_corpus.splits["train"]
    bigram = BigramModel.fit(split.ids, split.offsets, 320)
    row = np.array([result["token_ids"]])
    assert result["bigram_losses"] == bigram.losses(row)[0].tolist()
    assert result["unigram_losses"] == bigram.unigram.losses(row)[0].tolist()
    assert len(result["losses"]) == len(result["token_ids"]) - 1


@pytest.mark.usefixtures("uniform_model")
def test_a_uniform_model_is_right_by_chance() -> None:
    """The places 0 to 319 are shared: their mean is 159.5, and 1 in 320 is 0.3 %."""
    lines = inspect_tokens("--prompt", "Once upon").stdout.splitlines()
    means = next(line for line in lines if line.lstrip().startswith("mean"))
    assert means.endswith("0% top-1")
    first = lines[lines.index(means) - 1]
    assert "159.5" in first.split()


def test_without_the_corpus_there_are_no_baselines(
    trained_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a text file that is not there any more."""
    shutil.copytree(trained_run.path, tmp_path / "runs" / trained_run.name)
    config = tmp_path / "runs" / trained_run.name / "config.yaml"
    config.write_text(config.read_text().replace("num_documents: 10", "num_documents: 9"))
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(tmp_path / "runs"))
    result = inspect_tokens("--prompt", "Once upon")
    assert result.exit_code == 0, result.output
    assert "no baselines: the corpus 'stories'" in result.stderr
    assert "bigram  top" not in result.stdout
    numbers = shown("--prompt", "Once upon")
    assert (numbers["unigram_losses"], numbers["bigram_losses"], numbers["baselines"]) == (None, None, None)
    assert inspect_tokens("--prompt", "Once upon", "-o", "out.csv").exit_code == 0
    assert "bigram" not in Path("out.csv").read_text()


def test_the_table_has_a_line_for_each_token() -> None:
    result, numbers = inspect_tokens("--prompt", "Once [b]upon"), shown("--prompt", "Once [b]upon")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["token", "loss"])
    assert lines[head].split() == ["token", "loss", "bits", "entropy", "rank", "unigram", "bigram", "top", "prediction"]
    for index, label in enumerate(numbers["token_labels"][1:]):
        cells = lines[head + 1 + index].split()
        assert cells[0] == label
        columns = [numbers[name][index] for name in ("losses", "surprisals", "entropies")]
        assert cells[1:4] == [f"{columns[0]:.2f}", f"{columns[1]:.1f}", f"{columns[2]:.2f}"]
        assert cells[4] == str(numbers["ranks"][index])
        assert cells[5:7] == [f"{numbers[name][index]:.2f}" for name in ("unigram_losses", "bigram_losses")]
    mean = lines[head + len(numbers["token_labels"])].split()
    assert mean[:2] == ["mean", f"{np.mean(numbers['losses']):.2f}"]
    assert all(len(line) <= 80 for line in lines if not line.startswith("receipt"))
