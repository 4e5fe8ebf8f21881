"""`lumiere inspect logits`: what it shows, writes and refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import Result

from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from tests.cli.inspect.commands import inspect, inspect_json

PROMPT = ("--prompt", "One day a")
OWN_KEYS = {
    *("tokens", "positions", "by", "targets", "reference", "versus", "probabilities", "logits", "scales"),
    *("embed", "pos_embed", "attention", "heads", "sources", "feedforward", "neurons", "receipts"),
}


def inspect_logits(runs_dir: str, *options: str) -> Result:
    return inspect("logits", "--runs-dir", runs_dir, *options)


def shown(runs_dir: str, *options: str) -> dict[str, Any]:
    return inspect_json("logits", "--runs-dir", runs_dir, *options)


def test_json(runs_dir: str, tiny_corpus: TokenizedCorpus) -> None:
    target, versus = (tiny_corpus.tokenizer.encode(text)[0] for text in ("e", "s"))
    result = shown(runs_dir, *PROMPT, "--target", "e", "--vs", str(versus))
    assert result.keys() > OWN_KEYS
    length = len(result["token_ids"])
    assert (result["positions"], result["targets"], result["versus"]) == ([length - 1], [target], versus)
    assert result["reference"] == "token"
    assert np.shape(result["sources"]) == (1, 2, 2, length)
    assert np.shape(result["neurons"]) == (1, 2, 32)
    total = np.sum(result["embed"]) + np.sum(result["pos_embed"]) + np.sum(result["heads"]) + np.sum(result["neurons"])
    assert total == pytest.approx(result["logits"][0], abs=1e-5)
    assert [receipt["holds"] for receipt in result["receipts"]] == [True] * 4


def test_the_default_is_the_centred_logit_of_the_top_token_at_the_end(runs_dir: str) -> None:
    result = shown(runs_dir)
    assert result["reference"] == "mean"
    assert result["positions"] == [len(result["token_ids"]) - 1]
    assert shown(runs_dir, "--raw")["reference"] == "none"


def test_centered_logits_average_over_the_tokens_of_the_training_split(
    runs_dir: str, tiny_corpus: TokenizedCorpus, trained_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = shown(runs_dir, *PROMPT)
    with torch.no_grad():
        logits_V = trained_run.load_model("best").logits(torch.tensor([result["token_ids"]]))[0, -1].double().numpy()
    occurring = np.unique(tiny_corpus.splits["train"].ids)
    largest = logits_V.max()
    assert 0 < len(occurring) < len(logits_V)
    assert result["logits"][0] == pytest.approx(largest - logits_V[occurring].mean(), abs=1e-5)
    assert result["num_averaged"] == len(occurring)
    assert f"{len(occurring)} tokens" in result["averaged_over"]
    assert f"{len(occurring)} tokens" in " ".join(inspect_logits(runs_dir, *PROMPT).stdout.split())
    # Without the corpus, nobody knows which they are.
    monkeypatch.setattr(type(trained_run), "record", RunRecord(corpus_sha256="another"))
    result = shown(runs_dir, *PROMPT)
    assert result["logits"][0] == pytest.approx(largest - logits_V.mean(), abs=1e-5)
    assert f"all {len(logits_V)} tokens" in result["averaged_over"]


def test_log_probability(runs_dir: str, trained_run: Run) -> None:
    result = shown(runs_dir, *PROMPT, "--log-prob", "--target", "e")
    with torch.no_grad():
        logits_V = trained_run.load_model("best").logits(torch.tensor([result["token_ids"]]))[0, -1].double()
    log_p_V = logits_V.log_softmax(-1)
    entropy = -float((log_p_V.exp() * log_p_V).sum())
    assert (result["reference"], result["averaged_over"]) == ("prediction", None)
    assert result["logits"][0] == pytest.approx(float(log_p_V[result["targets"][0]]) + entropy, abs=1e-5)
    assert np.sum(result["embed"]) + np.sum(result["pos_embed"]) + np.sum(result["attention"]) + np.sum(
        result["feedforward"]
    ) == pytest.approx(result["logits"][0], abs=1e-5)
    assert inspect_logits(runs_dir, *PROMPT, "--log-prob").exit_code == 0


@pytest.mark.parametrize("by", ["layer", "head", "neuron", "source"])
def test_what_is_drawn_adds_up(runs_dir: str, by: str) -> None:
    numbers = shown(runs_dir, *PROMPT)
    for top_k in ("3", "200"):
        result = inspect_logits(runs_dir, *PROMPT, "--by", by, "--top-k", top_k)
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert max(len(line) for line in lines if not line.startswith("receipt")) <= 80
        first = next(number for number, line in enumerate(lines) if line.startswith("at position"))
        while lines[first]:
            first += 1
        body = [line.rstrip("█░ ").split() for line in lines[first + 1 : lines.index("", first + 1)]]
        assert body[-1][0] == "sum"
        assert float(body[-1][-1]) == pytest.approx(numbers["logits"][0], abs=6e-4)
        added = [float(line[-1]) for line in body[:-1]]
        assert sum(added) == pytest.approx(numbers["logits"][0], abs=5e-4 * len(added) + 6e-4)
        assert len(added) == 4 if top_k == "3" else len(added) > 4


def test_several_positions(runs_dir: str) -> None:
    text = inspect_logits(runs_dir, *PROMPT, "--pos", "0-1").stdout
    assert "at position 0, <|sot|>:" in text
    assert "at position 1," in text
    assert text.count("\nsum ") == 2


def test_a_difference_is_told(runs_dir: str, tiny_corpus: TokenizedCorpus) -> None:
    target, versus = (tiny_corpus.tokenizer.encode(text)[0] for text in ("e", "s"))
    text = " ".join(inspect_logits(runs_dir, *PROMPT, "--target", "e", "--vs", "s").stdout.split())
    assert f"the logit of e ({target}) minus that of s ({versus}) is " in text
