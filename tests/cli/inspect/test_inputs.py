"""Texts, tokens and lists that an analysis is given."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere.api import target as target_module
from lumiere.api.target import activation_bytes, count_tokens, parse_indices, parse_token
from lumiere.components.hooks import run_with_cache
from lumiere.data.dataset import TokenizedCorpus
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import LumiereError
from lumiere.persistence.runs import Run
from tests.cli.commands import refuse
from tests.cli.inspect.commands import shown


def test_texts_and_their_sources(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    encode = tiny_corpus.tokenizer.encode
    Path("short.txt").write_text("One day")
    Path("long.txt").write_text("One day " * 40)
    long = [0, *encode("One day " * 40)]
    windows, lengths = tiny_corpus.windows("validation", trained_run.load_config()).cut(np.array([2]))
    expected = {
        ("--file", "short.txt"): ([0, *encode("One day")], "short.txt"),
        ("--file", "long.txt"): (long[:16], f"long.txt, its first 16 of {len(long)} tokens"),
        ("--prompt", "Once upon"): ([0, *encode("Once upon")], "prompt"),
        ("--val", "2"): (windows[0, : min(lengths[0], 16)].tolist(), "window 2 of the validation split of stories"),
    }
    for options, (tokens, source) in expected.items():
        result = shown("attention", *options)
        assert (result["token_ids"], result["source"]) == (tokens, source)
    assert shown("attention")["source"] == "start of the validation split of stories"


def test_random_tokens_are_repeated() -> None:
    first, same, other = (shown("attention", "--random", "7", "--seed", seed)["token_ids"] for seed in "112")
    assert first[0] == 0
    assert first[1:8] == first[8:]
    assert len(set(first[1:8])) == 7
    assert min(first[1:]) > 2
    assert same == first != other


def test_snapshots_that_are_missing_or_damaged_are_refused(trained_run: Run) -> None:
    shutil.copytree(trained_run.path.parent, "copy")
    snapshots = Path("copy") / trained_run.name / "checkpoints" / "snapshots"
    damaged = snapshots / "step-00000002" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    refuse("inspect", "dynamics", "--runs-dir", "copy", "-m", "norm", "-o", "a.json", after_notes=True)
    assert not Path("a.json").exists()
    shutil.rmtree(snapshots)
    assert f"run {trained_run.id} " in refuse("inspect", "dynamics", "--runs-dir", "copy")[0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer with the token ` king`, but no token `king`."""
    return Tokenizer.train(["the king and the king and a queen"] * 4, 300, 2)


def test_tokens_by_id_text_and_label(tokenizer: Tokenizer, tiny_corpus: TokenizedCorpus) -> None:
    (king,) = tokenizer.encode(" king")
    expected = {" king": king, "·king": king, str(king): king, "<|eot|>": 1, "0": 0}
    assert {text: parse_token(text, tokenizer) for text in expected} == expected
    for token in range(len(tiny_corpus.tokenizer)):
        label = tiny_corpus.tokenizer.label(token)
        if not label.isdecimal() and label != "·":  # digits are ids, and the middle dot is two bytes
            assert tiny_corpus.tokenizer.label(parse_token(label, tiny_corpus.tokenizer)) == label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("king", "'king' is 2 tokens: kin g .did you mean '·king'"),
        ("qeen", "did you mean 'een'"),
        ("300", "there is no token 300"),
        ("", "an empty text"),
        ("@" * 40, r"is 40 tokens: (@ ){8}\.\.\. .give a text"),
    ],
)
def test_other_texts_are_not_a_token(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(LumiereError, match=message):
        parse_token(text, tokenizer)


@given(st.text(max_size=5))
def test_a_text_is_a_token_or_an_error(tokenizer: Tokenizer, text: str) -> None:
    try:
        token = parse_token(text, tokenizer)
    except LumiereError:
        assert text.isdecimal() or len(tokenizer.encode(text)) != 1  # a number is an id
    else:
        assert text.isdecimal() or text == tokenizer.label(token) or tokenizer.encode(text) == [token]


def test_tokens_are_counted_in_parts() -> None:
    ids = np.random.default_rng(0).integers(0, 50, 2_300_000).astype(np.uint16)
    assert count_tokens(ids, 60).tolist() == [int((ids == token).sum()) for token in range(60)]


def test_lists_and_ranges() -> None:
    expected = {
        None: [0, 1, 2, 3, 4],
        "2": [2],
        "0-2": [0, 1, 2],
        "3,0": [3, 0],
        "4, 1-2 ,1": [4, 1, 2],
        "-1": [4],
        "-2--1": [3, 4],
        "3--1": [3, 4],
    }
    assert {text: parse_indices(text, 5, "layer") for text in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "layer 5 .*0 to 4"),
        ("-6", "layer -6"),
        ("0-9", "layer 9"),
        ("3-1", "3-1"),
        ("", "''"),
        ("1,,2", "''"),
        ("one", "'one'"),
        ("1-2-3", "'1-2-3'"),
        ("1.5", "'1.5'"),
    ],
)
def test_other_texts_are_not_a_list(text: str, message: str) -> None:
    with pytest.raises(LumiereError, match=message):
        parse_indices(text, 5, "layer")


def test_memory_is_estimated_before_it_is_taken(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least all activations and the logits, at most a few times as much."""
    model, tokens = trained_run.load_model(), torch.arange(3, 19)[None]
    output, cache = run_with_cache(model, tokens)
    kept = sum(activation.numel() * 4 for activation in [*cache.values(), output.logits])
    assert kept < activation_bytes(model, 16) < 4 * kept
    monkeypatch.setattr(target_module, "available_memory", lambda: kept)
    refuse("inspect", "attention", "--prompt", "Once upon a time, Mia had a dog")
