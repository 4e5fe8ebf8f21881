"""Analyses of one model on many texts: `heads`, `ablate` and `summary`."""

from typing import Any

import numpy as np
import pytest
import torch

from lumiere.cli.inspect.heads import show_scores
from lumiere.data.batches import batches_in_order
from lumiere.data.dataset import TokenizedCorpus
from lumiere.data.tokenizer import SPECIAL_TOKENS
from lumiere.interpret.head_scores import SCORES, score_heads
from lumiere.interpret.summary import measure_activity
from lumiere.persistence.runs import Run
from tests.cli.commands import invoke
from tests.cli.inspect.commands import printed, shown, words
from tests.interpret.circuits import induction_circuit

SMALL = ("--batches", "2", "--batch-size", "3")


def test_heads_are_scored_on_random_tokens_twice() -> None:
    result = shown("heads")
    assert result["source"] == "32 sequences of 7 random tokens of the training split, twice (seed 0)"
    tokens = np.array(result["tokens"])
    assert tokens.shape == (32, 15)
    assert np.array_equal(tokens[:, 1:8], tokens[:, 8:])
    assert tokens[:, 1:].min() >= len(SPECIAL_TOKENS)
    assert (result["in_context_positions"], result["in_context_bands"]) == ([1, 14], [[1, 2], [12, 16]])
    other = shown("heads", "--seed", "1", "--random", "5")
    assert other["source"] == "32 sequences of 5 random tokens of the training split, twice (seed 1)"
    assert other["tokens"][0][1:6] != result["tokens"][0][1:6]


def test_heads_use_the_tokens_of_the_training_split(
    trained_run: Run, tiny_corpus: TokenizedCorpus, request: pytest.FixtureRequest
) -> None:
    occurring = set(tiny_corpus.splits["train"].ids.tolist())
    assert len(occurring) < len(tiny_corpus.tokenizer)  # single bytes that occur in no story
    model, tokens = trained_run.load_model("best"), torch.tensor([[0, 5, 6]])
    for has_corpus in (True, False):
        if not has_corpus:
            request.getfixturevalue("without_corpus")
        result = invoke("inspect", "heads", "--json")
        found = shown("heads")
        drawn = {token for row in found["tokens"] for token in row[1:]}
        assert (drawn <= occurring) == has_corpus
        averaged = sorted(occurring) if has_corpus else tiny_corpus.tokenizer.text_ids
        np.testing.assert_allclose(found["copying"], score_heads(model, tokens, averaged=averaged).copying, atol=1e-9)
        over = f"{len(averaged)} tokens"
        assert over in found["averaged_over"]
        assert over in words("heads")
        assert ("no in-context-learning score" in result.stderr) == (not has_corpus)
        assert (found["in_context_score"] is None) == (found["text_scores"] is None) == (not has_corpus)
        assert isinstance(found["repeat_gap"], float)
    assert found["source"] == "32 sequences of 7 random tokens of the vocabulary, twice (seed 0)"


def test_heads_on_a_text() -> None:
    result = shown("heads", "--prompt", "aa aa")
    assert (result["source"], result["tokens"]) == ("prompt", [result["token_ids"]])
    assert result["repeat_gap"] is None
    assert shown("heads", "--prompt", "ab")["scores"][0][0][3] is None  # no token comes twice


def test_heads_by_layer_head_and_threshold() -> None:
    everything = shown("heads")
    part = shown("heads", "--layer", "1", "--head", "1,0", "--threshold", "0")
    for name in ("scores", "copying"):
        assert part[name] == [everything[name][1][::-1]]
    excess = np.array(part["scores"][0]) - part["uniform"]
    above = (excess >= part["margin"]) & (excess > 2 * np.array(part["errors"][0]))
    assert [len(roles) for roles in part["roles"][0]] == above.sum(1).tolist()


def test_heads_prints_roles_and_overlaps(capsys: pytest.CaptureFixture[str]) -> None:
    show_scores(score_heads(induction_circuit(), torch.tensor([[0, *[3, 4, 5] * 4, 5, 5, 5]])), "all tokens")
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "previous heads: L0H0 (100% ± 3%)",
        "induction heads: L1H2 (",
        "2 tokens have a source of induction at t - 1",
        "3 tokens have a source of duplicate at t - 1",
    ):
        assert expected in text
    options = ("--threshold", "0.05")
    text = words("heads", *options)
    for expected in ("a role is a score of 5% or more", "repeat gap", "minus", "at positions 1 to 2 of"):
        assert expected in text
    # A model of 12 steps has roles by chance; the printed ones are those of the numbers.
    named = {role for layer in shown("heads", *options)["roles"] for head in layer for role in head}
    assert {word for word in SCORES if f"{word} heads: " in text} == named
    assert "no head has a role" in words("heads", "--threshold", "1")


def test_ablations_over_windows_of_the_validation_split(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    """Windows are drawn by the seed without replacement; all of them if fewer exist."""
    windows = tiny_corpus.windows("validation", trained_run.load_config())
    numbers = np.arange(len(windows))
    documents = dict(zip(map(tuple, windows.cut(numbers)[0]), windows.documents(numbers).tolist(), strict=True))
    part, same, other = (shown("ablate", *SMALL, "--seed", seed) for seed in "112")
    assert len(part["tokens"]) == 6
    assert part["documents"] == [documents[tuple(row)] for row in part["tokens"]]
    assert part["tokens"] == same["tokens"] != other["tokens"]
    assert part["source"] == f"6 of {len(windows)} windows of the validation split of stories (seed 1), in 2 batches"
    assert part["labels"] == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert (part["unit"], part["mode"]) == ("head", "mean")
    everything = shown("ablate", "--batches", "3", "--batch-size", "1000")
    assert sorted(map(tuple, everything["tokens"])) == sorted(documents)
    assert len(everything["num_targets"]) == 3
    few = shown("ablate", "--batches", "1000", "--batch-size", "1000", "--unit", "layer")
    assert len(few["num_targets"]) == len(windows)


def test_ablations_over_random_repeats_score_what_the_repeat_gap_scores() -> None:
    result = shown("ablate", *SMALL, "--random", "5", "--seed", "2")
    assert np.shape(result["tokens"]) == (6, 11)
    assert len({tuple(row) for row in result["tokens"]}) == 6
    assert (result["first_target"], result["num_targets"]) == (7, [12, 12])
    assert result["source"] == (
        "6 x 5 random tokens of the training split, twice (seed 2), in 2 batches; "
        "loss of tokens 2 to 5 of the second copy"
    )
    heads = shown("heads", "--random", "5")
    second = heads["losses"][6:]
    assert heads["repeat_gap"] == pytest.approx(np.mean(heads["losses"][1:5]) - np.mean(second))
    assert len(second) * 3 == result["num_targets"][0]


def test_ablations_on_one_text(tiny_corpus: TokenizedCorpus) -> None:
    result = shown("ablate", "--prompt", "Once upon", "--unit", "feedforward")
    ids = [0, *tiny_corpus.tokenizer.encode("Once upon")]
    assert result["tokens"] == [ids] == [result["token_ids"]]
    assert (result["source"], result["standard_errors"]) == ("prompt", [None, None])
    assert result["num_targets"] == [len(ids) - 1]


def test_ablated_units() -> None:
    expected = {
        "--layer 1 --head 0": ["L1H0"],
        "--unit neuron --neuron 3,0 --layer 0": ["L0N3", "L0N0"],
        "--unit position --pos -1 --layer 1": ["L1P15"],
        "--unit layer": ["L0", "L1"],
        "--unit feedforward --layer 1": ["L1 feed-forward"],
    }
    assert {options: shown("ablate", *SMALL, *options.split())["labels"] for options in expected} == expected


def test_many_ablations_have_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--batches", "2", "--random", "3")
    assert len(shown("ablate", *options)["tokens"]) == 64
    monkeypatch.setattr("lumiere.api.causes.MANY", 3)
    assert len(shown("ablate", *options)["tokens"]) == 8
    assert len(shown("ablate", *options, "--layer", "1")["tokens"]) == 64


def test_ablations_are_printed_largest_first() -> None:
    numbers = shown("ablate", *SMALL)
    result = invoke("inspect", "ablate", *SMALL, "--top-k", "3")
    lines = [line for line in printed("ablate", *SMALL, "--top-k", "3") if line.startswith("L")]
    changes, errors = np.array(numbers["changes"]), np.array(numbers["standard_errors"])
    for line, number in zip(lines, numbers["order"][:3], strict=True):
        assert line.startswith(f"{numbers['labels'][number]}  {changes[number]:+8.4f} ± {errors[number]:.4f}")
    assert "1 more" in result.stderr
    assert f"loss {numbers['loss']:.4f} nats; change without a head (mean), ± standard error:" in result.stdout
    # Six windows are of at most six documents: a 95 % interval is wider than 1.96 errors.
    count = len(set(numbers["documents"]))
    reach = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}[count]
    clear = (np.abs(changes) > reach * errors).sum()
    expected = f"{clear} of 4 changes exceed {reach:.2f} standard errors (95 %, few documents: {count})"
    assert expected in " ".join(result.stdout.split())
    assert "1.96 standard errors (95 %, 64 sequences)" in words("ablate", "--random", "3", "--batches", "2")


def test_summary_numbers(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    result = shown("summary", "--windows", "5", "--seed", "1")
    model, windows = trained_run.load_model("best"), tiny_corpus.windows("validation", trained_run.load_config())
    assert sum(result["parameters"].values()) == model.num_parameters
    assert result["num_windows"] == 5
    assert result["source"] == f"5 of {len(windows):,} windows of the validation split of stories (seed 1), in 1 batch"
    assert np.shape(result["largest_activations"]) == (2, 32)
    never = {check["what"]: check for check in result["checks"]}["tokens that were never met in training"]
    counts = np.bincount(tiny_corpus.splits["train"].ids, minlength=320)
    assert never["places"] == [str(token) for token in np.flatnonzero(counts == 0)]
    assert all(check["threshold"] for check in result["checks"])
    same, other = (shown("summary", "--windows", "5", "--seed", seed)["writes"] for seed in "12")
    assert result["writes"] == same != other
    expected, _ = measure_activity(model.eval(), batches_in_order(windows, 32))
    result = shown("summary", "--windows", "100000")
    assert (result["num_windows"], result["num_tokens"]) == (len(windows), expected["num_tokens"])
    np.testing.assert_allclose(result["writes"], expected["writes"], rtol=1e-5)


def test_summary_prints_the_numbers() -> None:
    numbers, lines = shown("summary"), printed("summary")
    text = " ".join(" ".join(lines).split())
    assert f"{sum(numbers['parameters'].values()):,}" in text
    gate = numbers["effective_ranks"][numbers["matrices"].index("blocks.1.feedforward.gate.weight")]
    assert next(line for line in lines if line.startswith("  L1")).split()[5] == f"{gate:.1f}"
    for check in numbers["checks"]:
        verdict, found = ("warning", f"{check['count']:,}") if check["count"] else ("ok", "no")
        assert f"{verdict} {found} {check['what']} (" in text
    assert f"{numbers['num_tokens']:,} tokens of {numbers['num_windows']:,}" in text


def test_summary_without_windows_or_corpus_is_of_the_weights(request: pytest.FixtureRequest) -> None:
    weights: dict[str, Any] = shown("summary", "--windows", "0")
    assert (weights["num_windows"], weights["writes"]) == (0, None)
    assert "norm of what each part writes" not in words("summary", "--windows", "0")
    request.getfixturevalue("without_corpus")
    result = invoke("inspect", "summary")
    assert "only the weights are summarized" in " ".join(result.stderr.split())
    assert "never met" not in result.stdout
    assert "weights alone" in result.stdout
