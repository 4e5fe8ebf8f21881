"""Tokens by id, by text, and as they are printed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumiere.cli.inspect.inputs import count_tokens, parse_token, token_label
from lumiere.data.dataset import TokenizedCorpus
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import LumiereError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Of which `king` alone is no token, but ` king` is."""
    return Tokenizer.train(["the king and the king and a queen"] * 4, 300, 2)


def test_ids_texts_and_labels(tokenizer: Tokenizer) -> None:
    king = tokenizer.encode(" king")
    assert len(king) == 1
    assert parse_token(" king", tokenizer) == king[0]
    assert parse_token("·king", tokenizer) == king[0]
    assert parse_token(str(king[0]), tokenizer) == king[0]
    assert parse_token("<|eot|>", tokenizer) == 1
    assert parse_token("0", tokenizer) == 0


def test_every_token_is_found_by_its_label_or_one_that_looks_the_same(tiny_corpus: TokenizedCorpus) -> None:
    tokenizer = tiny_corpus.tokenizer
    for token in range(len(tokenizer)):
        label = tokenizer.label(token)
        if not label.isdecimal() and label != "·":  # digits are ids, and the middle dot is two bytes of its own
            assert tokenizer.label(parse_token(label, tokenizer)) == label


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
def test_what_is_no_token(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(LumiereError, match=message):
        parse_token(text, tokenizer)


@given(st.text(max_size=5))
def test_a_text_is_a_token_or_an_error(tokenizer: Tokenizer, text: str) -> None:
    try:
        token = parse_token(text, tokenizer)
    except LumiereError:
        token = None
    # What is one token is found, whatever it is; a number is an id.
    if not text.isdecimal():
        ids = tokenizer.encode(text)
        labels = [tokenizer.label(other) for other in range(len(tokenizer))]
        assert (token is not None) == (len(ids) == 1 or text in labels)


def test_an_id_that_is_not_used_has_a_label_too(tokenizer: Tokenizer) -> None:
    assert token_label(tokenizer, len(tokenizer) + 5) == f"#{len(tokenizer) + 5}"
    assert token_label(tokenizer, 1) == "<|eot|>"


def test_tokens_are_counted_in_parts() -> None:
    ids = np.random.default_rng(0).integers(0, 50, 2_300_000).astype(np.uint16)
    assert count_tokens(ids, 60).tolist() == [int((ids == token).sum()) for token in range(60)]
