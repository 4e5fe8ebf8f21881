"""Text, token by token: which tokens may come, where texts end, and what a seed decides."""

import gc
import tracemalloc
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere.data.tokenizer import EOT, PAD, SOT, Tokenizer
from lumiere.errors import LumiereError, NonFiniteError
from lumiere.generation.decoding import (
    Limits,
    Piece,
    generate,
    generate_pieces,
    prompt_tokens,
    row_random,
    suppressed_ids,
)
from lumiere.generation.kv_cache import CachedDecoder
from lumiere.generation.sampling import Sampling
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run
from tests.generation.conftest import Script

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model(trained_run: Run) -> Transformer:
    return trained_run.load_model()


def endless(model: Transformer, tokenizer: Tokenizer) -> CachedDecoder:
    """A decoder that never ends a document, so that texts are as long as a test needs them."""
    return CachedDecoder(model, [EOT, *suppressed_ids(model.vocab_size, len(tokenizer))])


def play(script: Sequence[int], tokenizer: Tokenizer, **limits: Any) -> list[Piece]:
    """The pieces that come of a script."""
    decoder = Script(script, len(tokenizer))
    return list(generate_pieces(decoder, tokenizer, [[SOT]], GREEDY, [Random()], Limits(**limits)))


def texts(pieces: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.text]


def test_greedy_is_the_likeliest_token_each_time(model: Transformer, tokenizer: Tokenizer) -> None:
    """By hand, on the watching path, past the context window of 16, which then keeps 8."""
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
    assert [piece.token.id for piece in pieces if piece.token] == expected
    assert "".join(texts(pieces)) == tokenizer.decode(expected)


def test_a_seed_gives_the_same_text(model: Transformer, tokenizer: Tokenizer) -> None:
    def text(seed: int | None) -> str:
        return "".join(generate(model, tokenizer, "The", 60, seed=seed))

    first = text(3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert text(3) == first
    # The global generator is neither read nor moved.
    assert torch.equal(torch.get_rng_state(), state)
    assert text(4) != first
    assert text(None) != text(None)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=20, top_p=0.9), Sampling(1.2, min_p=0.01)])
def test_rows_together_write_what_each_writes_alone(
    model: Transformer, tokenizer: Tokenizer, sampling: Sampling
) -> None:
    """Prompts of different lengths, ends at different times, past the window."""
    decoder = CachedDecoder(model.double(), suppressed_ids(model.vocab_size, len(tokenizer)))
    rows = [prompt_tokens(tokenizer, prompt) for prompt in ("The", "Once upon a time there was", None, "x " * 30)]

    def written(numbers: Sequence[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {number: [] for number in numbers}
        randoms = [row_random(5, number) for number in numbers]
        for piece in generate_pieces(decoder, tokenizer, [rows[i] for i in numbers], sampling, randoms, Limits(50)):
            found[numbers[piece.row]].append(piece.token.id if piece.token else -1)
        return found

    together = written([0, 1, 2, 3])
    assert together == written([2, 0]) | written([3]) | written([1])
    assert len({tuple(tokens) for tokens in together.values()}) == 4


def test_pieces_are_the_text_of_the_tokens(model: Transformer, tokenizer: Tokenizer) -> None:
    """Hot enough for bytes that are no characters."""
    rows, sampling = [prompt_tokens(tokenizer, "The")], Sampling(temperature=5.0)
    pieces = list(generate_pieces(endless(model, tokenizer), tokenizer, rows, sampling, [row_random(7)], Limits(200)))
    tokens = [piece.token.id for piece in pieces if piece.token]
    assert len(tokens) == 200
    assert "\ufffd" in tokenizer.decode(tokens)
    assert "".join(texts(pieces)) == tokenizer.decode(tokens)


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("a😀é!")
    assert len(script) == 1 + 4 + 2 + 1
    assert texts(play([*script, EOT], tokenizer)) == ["a", "😀", "é", "!"]
    grin, a = tokenizer.encode("😀"), tokenizer.encode("a")
    # Cut off by another character, by the end of the document, and by the number of tokens.
    assert texts(play([*grin[:2], *a, EOT], tokenizer)) == ["\ufffda"]
    assert texts(play([*a, *grin[:3], EOT], tokenizer)) == ["a", "\ufffd"]
    assert texts(play(grin, tokenizer, max_new_tokens=3)) == ["\ufffd"]


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
    # The last token that may come is the first half of a stop string, or its second half.
    assert ending(stop=("yz",), max_new_tokens=2) == (["x", "y"], "length")
    assert ending(stop=("yz",), max_new_tokens=3) == (["x"], "stop")


def test_rows_end_alone(tokenizer: Tokenizer) -> None:
    """The stub tells every row the same, so only stop strings tell them apart; the other goes on."""

    class Two(Script):
        def _logits(self) -> Tensor:
            logits_BV = super()._logits()
            for row, shown in enumerate(self.shown):
                if shown[1] == 5 and len(shown) == 4:
                    logits_BV[row, EOT] = 20.0
            return logits_BV

    decoder = Two([10] * 9, len(tokenizer))
    rows = [[SOT, 5], [SOT, 6]]
    pieces = list(generate_pieces(decoder, tokenizer, rows, GREEDY, [Random()] * 2, Limits(6)))
    ends = [(piece.row, piece.finish_reason) for piece in pieces if piece.finish_reason]
    assert ends == [(0, "eos"), (1, "length")]
    assert sum(piece.token is not None for piece in pieces if piece.row == 0) == 2
    assert sum(piece.token is not None for piece in pieces if piece.row == 1) == 6
    assert decoder.shown == [[SOT, 6, *[10] * 5]]


def test_logprobs_are_those_of_the_model(model: Transformer, tokenizer: Tokenizer) -> None:
    """Whatever the controls are; by a full forward pass without the ids that never come."""
    suppressed = suppressed_ids(model.vocab_size, len(tokenizer))
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
        values, ids = expected_V.topk(3)
        assert [i for i, _ in token.alternatives] == ids.tolist()
        assert [value for _, value in token.alternatives] == pytest.approx(values.tolist(), abs=1e-4)
        row = [*row, token.id]
    assert play([5, EOT], tokenizer)[0].token.logprob is None  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_of_ours(
    value: float, temperature: float, tokenizer: Tokenizer
) -> None:
    class Broken(Script):
        def _logits(self) -> Tensor:
            logits_BV = torch.zeros(2, self.vocab_size)
            logits_BV[1] = value
            return logits_BV

    pieces = generate_pieces(Broken([], 40), tokenizer, [[SOT]] * 2, Sampling(temperature), [Random()] * 2, Limits(5))
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        next(pieces)


def test_no_token_without_a_text_comes() -> None:
    assert suppressed_ids(8, 6) == [SOT, PAD, 6, 7]


def test_repetition_is_held_against_prompt_and_text(tokenizer: Tokenizer) -> None:
    """Without it the stub would write the same token again and again."""
    decoder = Script([10] * 9, 12)
    sampling = Sampling(temperature=0, no_repeat_ngram_size=1)
    pieces = list(generate_pieces(decoder, tokenizer, [[SOT, 3]], sampling, [Random()], Limits(1)))
    assert [piece.token.id for piece in pieces if piece.token] == [10]
    decoder = Script([10] * 9, 12)
    pieces = list(generate_pieces(decoder, tokenizer, [[SOT, 10]], sampling, [Random()], Limits(1)))
    assert pieces[0].token is None or pieces[0].token.id != 10
    # Two ids, both there already.
    with pytest.raises(LumiereError, match="every token would repeat an n-gram"):
        next(generate_pieces(Script([1], 2), tokenizer, [[0, 1]], sampling, [Random()], Limits(1)))


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "the prompt is empty"), (" \n", "empty"), ("\ud800", "surrogate")]
)
def test_refused_prompts(model: Transformer, tokenizer: Tokenizer, prompt: str, message: str) -> None:
    with pytest.raises(LumiereError, match=message) as caught:
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
    # The text itself would be 80 kB of references.
    assert marks[1] - marks[0] < 20_000
    # The views of all positions are there by then; one tensor a step would be 8,000.
    assert num_tensors[1] - num_tensors[0] < 100
