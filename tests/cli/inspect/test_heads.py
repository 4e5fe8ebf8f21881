"""`inspect heads`: which tokens it takes, its view, its files, its errors."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from lumiere.cli.inspect.heads import show_scores
from lumiere.data.dataset import TokenizedCorpus
from lumiere.data.tokenizer import SPECIAL_TOKENS
from lumiere.interpret.head_scores import SCORES, score_heads
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from tests.cli.inspect.commands import inspect, inspect_json
from tests.interpret.circuits import induction_circuit

inspect_heads = partial(inspect, "heads")
shown = partial(inspect_json, "heads")

KEYS = {"tokens", "layers", "heads", "score_names", "scores", "uniform", "num_destinations", "copying", "threshold"}
KEYS |= {
    "errors",
    "num_overlaps",
    "margin",
    "num_averaged",
    "averaged_over",
    "roles",
    "losses",
    "repeat_gap",
    "repeat_gap_error",
    "in_context_positions",
    "in_context_losses",
    "in_context_score",
    "in_context_error",
    "in_context_bands",
}
KEYS |= {"receipts", "schema_version", "analysis", "run", "source", "seed"}


def test_without_a_text_it_takes_random_tokens_twice(runs_dir: str) -> None:
    result = shown("--runs-dir", runs_dir)
    assert set(result) >= KEYS
    assert result["source"] == "32 sequences of 7 random tokens of the training split, twice (seed 0)"
    assert len(result["tokens"]) == 32
    for row in result["tokens"]:
        assert row[1:8] == row[8:]
        assert min(row[1:]) >= len(SPECIAL_TOKENS)
    assert (result["in_context_positions"], result["in_context_bands"]) == ([1, 14], [[1, 2], [12, 16]])
    assert all(receipt["holds"] for receipt in result["receipts"])
    other = shown("--runs-dir", runs_dir, "--seed", "1", "--random", "5")
    assert other["source"] == "32 sequences of 5 random tokens of the training split, twice (seed 1)"
    assert other["tokens"][0][1:6] != result["tokens"][0][1:6]


def test_random_tokens_are_of_the_training_split(
    trained_run: Run, tiny_corpus: TokenizedCorpus, runs_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    occurring = set(tiny_corpus.splits["train"].ids.tolist())
    assert len(occurring) < len(tiny_corpus.tokenizer)  # single bytes that no story has
    options = ("--runs-dir", runs_dir)
    drawn = {token for row in shown(*options)["tokens"] for token in row[1:]}
    assert drawn <= occurring
    # Without the corpus, nobody knows which they are.
    monkeypatch.setattr(type(trained_run), "record", RunRecord(corpus_sha256="another"))
    result = shown(*options)
    assert result["source"] == "32 sequences of 7 random tokens of the vocabulary, twice (seed 0)"
    assert not {token for row in result["tokens"] for token in row[1:]} <= occurring


def test_copying_is_over_the_tokens_of_the_training_split(
    trained_run: Run, tiny_corpus: TokenizedCorpus, runs_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    occurring = np.unique(tiny_corpus.splits["train"].ids).tolist()
    model, tokens = trained_run.load_model("best"), torch.tensor([[0, 5, 6]])
    for over, words in ((occurring, f"{len(occurring)} tokens"), (None, f"all {model.vocab_size} tokens")):
        if over is None:
            monkeypatch.setattr(type(trained_run), "record", RunRecord(corpus_sha256="another"))
        result = shown("--runs-dir", runs_dir)
        np.testing.assert_allclose(result["copying"], score_heads(model, tokens, averaged=over).copying, atol=1e-9)
        assert words in result["averaged_over"]
        assert words in " ".join(inspect_heads("--runs-dir", runs_dir).stdout.split())


def test_a_text_takes_their_place(runs_dir: str) -> None:
    result = shown("--runs-dir", runs_dir, "--prompt", "aa aa")
    assert result["source"] == "prompt"
    assert result["tokens"] == [result["token_ids"]]
    assert result["repeat_gap"] is None
    single = shown("--runs-dir", runs_dir, "--prompt", "ab")
    assert single["scores"][0][0][3] is None  # no token comes twice


def test_layers_heads_and_threshold(runs_dir: str) -> None:
    everything = shown("--runs-dir", runs_dir)
    part = shown("--runs-dir", runs_dir, "--layer", "1", "--head", "1,0", "--threshold", "0")
    assert part["scores"] == [[everything["scores"][1][1], everything["scores"][1][0]]]
    assert part["copying"] == [[everything["copying"][1][1], everything["copying"][1][0]]]
    excess = np.array(part["scores"][0]) - part["uniform"]
    above = (excess >= part["margin"]) & (excess > 2 * np.array(part["errors"][0]))
    assert [len(roles) for roles in part["roles"][0]] == above.sum(1).tolist()


def test_the_view_names_the_heads_of_each_role_and_what_overlaps(capsys: pytest.CaptureFixture[str]) -> None:
    show_scores(score_heads(induction_circuit(), torch.tensor([[0, *[3, 4, 5] * 4, 5, 5, 5]])), "all tokens")
    words = " ".join(capsys.readouterr().out.split())
    assert "previous heads: L0H0 (100% ± 3%)" in words
    assert "induction heads: L1H2 (" in words
    assert "2 tokens have a source of induction at t - 1" in words
    assert "3 tokens have a source of duplicate at t - 1" in words


def test_the_view_fits_80_columns_and_says_the_threshold(runs_dir: str) -> None:
    result = inspect_heads("--runs-dir", runs_dir, "--threshold", "0.05")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    words = " ".join(result.stdout.split())
    assert "a role is a score of 5% or more" in words
    # On a model of 12 steps it is chance which roles there are; the view has those of the numbers, and no others.
    roles = shown("--runs-dir", runs_dir, "--threshold", "0.05")["roles"]
    named = {role for layer in roles for head in layer for role in head}
    assert {word for word in SCORES if f"{word} heads: " in words} == named
    assert "repeat gap" in words
    assert "minus" in words
    assert "at positions 1 to 2 of" in words
    none = inspect_heads("--runs-dir", runs_dir, "--threshold", "1").stdout
    assert "no head has a role" in none


def test_without_the_corpus_the_scores_are_there(
    trained_run: Run, runs_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(trained_run), "record", RunRecord(corpus_sha256="another"))
    result = inspect_heads("--runs-dir", runs_dir, "--json")
    assert result.exit_code == 0, result.output
    assert "no in-context-learning score" in result.stderr
    found = json.loads(result.stdout)
    assert found["in_context_score"] is None
    assert found["text_scores"] is None
    assert isinstance(found["repeat_gap"], float)
