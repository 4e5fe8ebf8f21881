"""Text, token by token.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from random import Random
from typing import Literal

import torch
from torch import Tensor

from lumiere.data.text import plain
from lumiere.data.tokenizer import EOT, PAD, SOT, Tokenizer
from lumiere.errors import LumiereError, NonFiniteError
from lumiere.generation.cached import CachedDecoder
from lumiere.generation.repetition import Repetition
from lumiere.generation.sampling import Sampling, draw
from lumiere.generation.streaming import TextStream
from lumiere.generation.window import Decoder
from lumiere.models.transformer import Transformer

FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True, slots=True)
class Token:
    """A token that was chosen.

    Attributes:
        logprob: log of the probability that the model itself gave it, in nats, before any control; None if not asked.
        alternatives: the likeliest tokens and their logs of probability, likeliest first.
    """

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step adds to a row.

    Attributes:
        row: which text.
        text: whole characters; empty while it is not certain what they are.
        token: the token chosen; None where the text ends instead.
        finish_reason: why the row ends here: the model ended the document, `max_new_tokens`, or a stop string; None
            while it goes on.
    """

    row: int
    text: str
    token: Token | None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Limits:
    """Where texts end, and what is told of them.

    Attributes:
        max_new_tokens: tokens after which a text ends, unless the model ends it before.
        stop: strings that end a text.
        num_logprobs: alternatives of each token; 0 gives the token's own logprob, None nothing.

    Raises:
        LumiereError: if a number is negative or a stop string empty.
    """

    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise LumiereError(f"max-new-tokens must be 0 or more, not {self.max_new_tokens}", "200 is the default")
        if not all(self.stop):
            raise LumiereError("a stop string is empty", "an empty string is everywhere; leave it out")
        if self.num_logprobs is not None and self.num_logprobs < 0:
            raise LumiereError(f"logprobs must be 0 or more, not {self.num_logprobs}", "0 shows the tokens' own")


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | None = None,
    max_new_tokens: int = 200,
    sampling: Sampling | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Stream the text that `model` writes after `prompt`, in pieces that are whole characters.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: the one that the model was trained with.
        prompt: the beginning of a document, not repeated in what is returned (None: the model begins by itself).
        max_new_tokens: tokens after which the text ends, unless the model ends it before.
        sampling: how each token is chosen (None: `Sampling()`).
        seed: of the draws (None: a new one each time).
        stop: strings that end the text where they begin.

    Raises:
        LumiereError: if the prompt or a stop string is empty, or `max_new_tokens` negative.
        NonFiniteError: if the model's logits are no finite numbers, as those of a broken model are.
    """
    limits = Limits(max_new_tokens, tuple(stop))
    rows = [prompt_tokens(tokenizer, prompt)]
    decoder = CachedDecoder(model, suppressed_ids(model.vocab_size, len(tokenizer)))
    return (
        piece.text
        for piece in generate_pieces(decoder, tokenizer, rows, sampling or Sampling(), [row_random(seed)], limits)
        if piece.text
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    """The tokens of the beginning of a document.

    Raises:
        LumiereError: if the prompt is empty.
    """
    if prompt is not None and not prompt.strip():
        raise LumiereError("the prompt is empty", "give it some text, or leave it out to let the model begin")
    return tokenizer.encode(plain(prompt or ""), start=True)


def suppressed_ids(vocab_size: int, num_used: int) -> list[int]:
    """The ids that stand for no text: start and padding, and those that the corpus was too small for."""
    return [SOT, PAD, *range(num_used, vocab_size)]


def row_random(seed: int | None, prompt: int = 0, sequence: int = 0) -> Random:
    """The random numbers of one row: a function of the seed and of what the row is, not of its neighbours."""
    return Random() if seed is None else Random(f"{seed}/{prompt}/{sequence}")


def generate_pieces(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    randoms: Sequence[Random],
    limits: Limits,
) -> Iterator[Piece]:
    """Write on after each row, all at once; a piece for each token of each row that has not ended.

    Args:
        decoder: its logits are minus infinity at ids that may not come.
        rows: tokens of each text so far, at least one.
        randoms: of each row; each token takes one number of its own row's.
    """
    streams = [TextStream(tokenizer, limits.stop) for _ in rows]
    if limits.max_new_tokens == 0:
        yield from (Piece(row, "", None, "length") for row in range(len(rows)))
        return
    active = list(range(len(rows)))
    logits_BV = checked(decoder.start(rows))
    repetition = None
    if sampling.repetition_penalty is not None or sampling.no_repeat_ngram_size is not None:
        repetition = Repetition(rows, sampling, logits_BV.shape[-1], logits_BV.device)
    for num_tokens in range(1, limits.max_new_tokens + 1):
        chosen_from_BV = logits_BV if repetition is None else _open_to_something(repetition.applied(logits_BV))
        ids = draw(chosen_from_BV, sampling, [randoms[row].random() for row in active])
        tokens = _tokens(logits_BV, ids, limits.num_logprobs)
        going = []
        for place, (row, token) in enumerate(zip(active, tokens, strict=True)):
            stream = streams[row]
            if token.id == EOT:
                yield Piece(row, stream.finish(), None, "eos")
                continue
            text = stream.push(token.id)
            if stream.is_stopped:
                yield Piece(row, text, token, "stop")
            elif num_tokens == limits.max_new_tokens:
                yield Piece(row, text + stream.finish(), token, "stop" if stream.is_stopped else "length")
            else:
                yield Piece(row, text, token)
                going.append(place)
        if not going:
            return
        if len(going) < len(active):
            decoder.keep(going)
            active, ids = [active[place] for place in going], [ids[place] for place in going]
            if repetition is not None:
                repetition.keep(going)
        if repetition is not None:
            repetition.append(ids)
        logits_BV = checked(decoder.step(ids))


def checked(logits_BV: Tensor) -> Tensor:
    """The logits.

    Raises:
        NonFiniteError: a row has none that is a finite number, or one that is not a number.
    """
    # NaN is the largest of all; minus infinity, if it is the largest, stands everywhere.
    if not isfinite(logits_BV.amax(-1).sum().item()):
        raise NonFiniteError("the model's logits are not finite numbers", "its weights are broken: train it anew")
    return logits_BV


def _open_to_something(logits_BV: Tensor) -> Tensor:
    if not isfinite(logits_BV.amax(-1).sum().item()):
        raise LumiereError("every token would repeat an n-gram", "raise no-repeat-ngram-size, or write fewer tokens")
    return logits_BV


def _tokens(logits_BV: Tensor, ids: Sequence[int], num_logprobs: int | None) -> list[Token]:
    if num_logprobs is None:
        return [Token(token) for token in ids]
    logprobs_BV = logits_BV.cpu().double().log_softmax(-1)
    values, indices = logprobs_BV.topk(min(num_logprobs, logprobs_BV.shape[-1]), dim=-1)
    alternatives = [
        tuple((i, value) for i, value in zip(*pair, strict=True) if value > -torch.inf)
        for pair in zip(indices.tolist(), values.tolist(), strict=True)
    ]
    own = logprobs_BV[torch.arange(len(ids)), torch.tensor(ids)].tolist()
    return [Token(*parts) for parts in zip(ids, own, alternatives, strict=True)]
