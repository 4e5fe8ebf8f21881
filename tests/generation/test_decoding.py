"""Generation token by token: which tokens are allowed, where texts end, what a seed determines, what a stream shows."""

import gc
import tracemalloc
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere.data.tokenizer import EOT, PAD, SOT, Tokenizer
from lumiere.errors import LumiereError, NonFiniteError
from lumiere.generation.decoding import (
    Limits,
    Piece,
    TextStream,
    generate,
    generate_pieces,
    prompt_tokens,
    row_random,
    suppressed_ids,
)
from lumiere.generation.kv_cache import CachedDecoder
from lumiere.generation.sampling import Sampling
from lumiere.models.transformer import Transformer
from tests.generation.conftest import Script

GREEDY = Sampling(temperature=0)


def endless(model: Transformer, tokenizer: Tokenizer) -> CachedDecoder:
    """A decoder that never ends a document, so that texts are as long as a test needs them."""
    return CachedDecoder(model, [EOT, *suppressed_ids(model.vocab_size, tokenizer)])


def play(script: Sequence[int], tokenizer: Tokenizer, **limits: Any) -> list[Piece]:
    decoder = Script(script, len(tokenizer))
    return list(generate_pieces(decoder, tokenizer, [[SOT]], GREEDY, [Random()], Limits(**limits)))


def texts(pieces: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.text]


def ids(pieces: Sequence[Piece]) -> list[int]:
    return [piece.token.id for piece in pieces if piece.token]


def test_greedy_takes_the_most_probable_token_each_time(model: Transformer, tokenizer: Tokenizer) -> None:
    """By hand, past the context window of 16, which then keeps 8."""
    window = [SOT, *tokenizer.encode("Once there was")]
    expected = []
    for _ in range(40):
        with torch.no_grad():
            logits_V = model(torch.tensor([window])).logits[0, -1]
        allowed = [i for i in range(len(tokenizer)) if i not in (SOT, PAD, EOT)]
        expected.append(max(allowed, key=lambda i: float(logits_V[i])))
        window = [*(window[-8:] if len(window) == 16 else window), expected[-1]]
    rows = [prompt_tokens(tokenizer, "Once there was")]
    pieces = list(generate_pieces(endless(model, tokenizer), tokenizer, rows, GREEDY, [Random()], Limits(40)))
    assert ids(pieces) == expected
    assert "".join(texts(pieces)) == tokenizer.decode(expected)


def test_a_seed_gives_the_same_text(model: Transformer, tokenizer: Tokenizer) -> None:
    def text(seed: int | None) -> str:
        return "".join(generate(model, tokenizer, "The", 60, seed=seed))

    first = text(3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert text(3) == first
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is neither read nor moved
    assert text(4) != first
    assert text(None) != text(None)


def test_why_texts_end(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("xyz")

    def ending(**limits: Any) -> tuple[list[str], str | None]:
        pieces = play([*script, EOT], tokenizer, **limits)
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        return texts(pieces), pieces[-1].finish_reason

    assert ending() == (["x", "y", "z"], "eos")
    assert ending(max_new_tokens=2) == (["x", "y"], "length")
    assert ending(max_new_tokens=0) == ([], "length")
    assert ending(stop=("yz",)) == (["x"], "stop")
    # The last token allowed is the first half of a stop string, or its second half.
    assert ending(stop=("yz",), max_new_tokens=2) == (["x", "y"], "length")
    assert ending(stop=("yz",), max_new_tokens=3) == (["x"], "stop")
    grin = tokenizer.encode("😀")
    assert texts(play(grin, tokenizer, max_new_tokens=3)) == ["\ufffd"]
    assert texts(play([*grin[:2], *script[:1], EOT], tokenizer)) == ["\ufffdx"]


# An n-gram of 8 tokens never comes twice here, but its record drops rows with the others.
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0, no_repeat_ngram_size=8)])
def test_a_row_that_ends_leaves_the_others_alone(tokenizer: Tokenizer, sampling: Sampling) -> None:
    def end_the_first(logits_BV: torch.Tensor, shown: list[list[int]]) -> None:
        for row, tokens in enumerate(shown):
            if tokens[1] == 5 and len(tokens) == 4:
                logits_BV[row, EOT] = 20.0

    decoder = Script([10] * 9, len(tokenizer), end_the_first)
    rows = [[SOT, 5], [SOT, 6]]
    pieces = list(generate_pieces(decoder, tokenizer, rows, sampling, [Random()] * 2, Limits(6)))
    assert [(piece.row, piece.finish_reason) for piece in pieces if piece.finish_reason] == [(0, "eos"), (1, "length")]
    assert [len(ids([piece for piece in pieces if piece.row == row])) for row in (0, 1)] == [2, 6]
    assert decoder.shown == [[SOT, 6, *[10] * 5]]


def test_logprobs_are_those_of_the_model(model: Transformer, tokenizer: Tokenizer) -> None:
    """Whatever the controls are: a full forward pass without the ids that are never generated."""
    suppressed = suppressed_ids(model.vocab_size, tokenizer)
    decoder = CachedDecoder(model, suppressed)
    row = prompt_tokens(tokenizer, "The")
    sampling = Sampling(0.5, top_k=7, repetition_penalty=1.5)
    for piece in generate_pieces(decoder, tokenizer, [row], sampling, [row_random(1)], Limits(8, num_logprobs=3)):
        token = piece.token
        if token is None:
            break
        with torch.no_grad():
            logits_V = model.logits(torch.tensor([row]))[0, -1]
        logits_V[suppressed] = -torch.inf
        expected_V = logits_V.log_softmax(0)
        assert token.logprob == pytest.approx(float(expected_V[token.id]), abs=1e-4)
        values, alternatives = expected_V.topk(3)
        assert [i for i, _ in token.alternatives] == alternatives.tolist()
        assert [value for _, value in token.alternatives] == pytest.approx(values.tolist(), abs=1e-4)
        row = [*row, token.id]
    (first, _) = play([5, EOT], tokenizer)
    assert first.token is not None
    assert first.token.logprob is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_an_error(value: float, temperature: float, tokenizer: Tokenizer) -> None:
    broken = Script([1], 40, lambda logits_BV, shown: logits_BV[1].fill_(value))
    pieces = generate_pieces(broken, tokenizer, [[SOT]] * 2, Sampling(temperature), [Random()] * 2, Limits(5))
    with pytest.raises(NonFiniteError):
        next(pieces)


def test_ids_without_text_are_never_generated(tokenizer: Tokenizer) -> None:
    used = len(tokenizer)
    assert suppressed_ids(used + 2, tokenizer) == [SOT, PAD, used, used + 1]


def test_the_prompt_counts_as_text_for_repetition(tokenizer: Tokenizer) -> None:
    sampling = Sampling(temperature=0, no_repeat_ngram_size=1)

    def first_ids(prompt: list[int], vocab_size: int) -> list[int]:
        script = Script([10 % vocab_size] * 9, vocab_size)
        return ids(list(generate_pieces(script, tokenizer, [prompt], sampling, [Random()], Limits(1))))

    assert first_ids([SOT, 3], 12) == [10]
    assert first_ids([SOT, 10], 12) != [10]
    with pytest.raises(LumiereError, match="n-gram"):
        first_ids([0, 1], 2)  # two ids, both in the prompt


@pytest.mark.parametrize(("prompt", "named"), [("", "prompt"), (" \n", "prompt"), ("\ud800", "surrogate")])
def test_refused_prompts(model: Transformer, tokenizer: Tokenizer, prompt: str, named: str) -> None:
    with pytest.raises(LumiereError, match=named) as caught:
        generate(model, tokenizer, prompt)
    assert caught.value.hint


@pytest.mark.parametrize("limits", [{"max_new_tokens": -1}, {"stop": ("a", "")}, {"num_logprobs": -1}])
def test_refused_limits(limits: dict[str, Any]) -> None:
    with pytest.raises(LumiereError) as caught:
        Limits(**limits)
    assert caught.value.hint


@pytest.mark.slow
def test_ten_thousand_tokens_take_no_more_memory_than_two_thousand(model: Transformer, tokenizer: Tokenizer) -> None:
    decoder = endless(model, tokenizer)
    pieces = generate_pieces(decoder, tokenizer, [[SOT]], Sampling(), [row_random(0)], Limits(10_000))
    tracemalloc.start()
    try:
        marks, num_tensors, number = [], [], 0
        for number, piece in enumerate(pieces, start=1):
            assert piece.token is not None
            if number in (2_000, 10_000):
                marks.append(tracemalloc.get_traced_memory()[0])
                num_tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        assert number == 10_000
    finally:
        tracemalloc.stop()
    assert marks[1] - marks[0] < 20_000  # the text itself would be 80 kB of references
    # The views of all positions exist by then; one tensor per step would be 8,000.
    assert num_tensors[1] - num_tensors[0] < 100


# --- streams of text --------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def normalize(self, text: str) -> str:
        return text


def pushed(text: bytes, stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(Bytes(), stop)  # pyright: ignore[reportArgumentType]
    pieces = [stream.push(byte) for byte in text]
    return [*pieces, stream.finish()], stream.is_stopped


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "is_stopped"),
    [
        ("a😀é!".encode(), [], ["a", "", "", "", "😀", "", "é", "!", ""], False),
        ("😀".encode()[:3], [], ["", "", "", "\ufffd"], False),
        (b"one. Two", [". T"], ["o", "n", "e", "", "", "", "", "", ""], True),
        (b"a.b", [". T"], ["a", "", ".b", ""], False),  # it only looked like a stop string
        (b"aab", ["ab"], ["", "a", "", ""], True),
        (b"x..", ["...", "!"], ["x", "", "", ".."], False),
    ],
)
def test_no_piece_holds_half_a_character_or_the_start_of_a_stop_string(
    text: bytes, stop: list[str], pieces: list[str], is_stopped: bool
) -> None:
    assert pushed(text, stop) == (pieces, is_stopped)


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_the_text_is_what_precedes_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, is_stopped = pushed(text.encode(), stop)
    # The earliest end, since the text is read from its beginning; then its earliest beginning.
    ends = [text.find(each) + len(each) for each in stop if each in text]
    shown = text[: min(ends)] if ends else text
    begins = [shown.find(each) for each in stop if each in shown]
    assert "".join(pieces) == (shown[: min(begins)] if ends else text)
    assert is_stopped == bool(ends)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("Once there was a fox. It slept.", "e was a", "Once ther"),  # across the border of tokens
        ("Once there was a fox. It slept.", "x. I", "Once there was a fo"),
        ("Wait... No", "…", "Wait"),  # normalized as the training text is
        ("a\nNo", "\r\nＮ", "a"),
        ("a fish", "ﬁ", "a "),
    ],
)
def test_a_stop_string_is_found_in_what_the_model_generates(
    tokenizer: Tokenizer, text: str, stop: str, shown: str
) -> None:
    stream = TextStream(tokenizer, [stop])
    assert "".join(map(stream.push, tokenizer.encode(text))) + stream.finish() == shown
    assert stream.is_stopped


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(LumiereError):
        TextStream(tokenizer, ["a", ""])
