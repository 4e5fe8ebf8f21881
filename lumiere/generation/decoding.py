"""Generate text token by token: sampling, greedy decoding and beam search.

Shapes: B rows, V vocabulary.
"""

import codecs
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from random import Random
from typing import Literal

import torch
from torch import Tensor

from lumiere.data.text import plain
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import LumiereError, NonFiniteError
from lumiere.generation.kv_cache import CachedDecoder, Decoder
from lumiere.generation.sampling import Repetition, Sampling, draw
from lumiere.models.transformer import Transformer


class TextStream:
    """The text of one row of tokens, released as soon as it is final.

    Args:
        stop: Strings that end the text where they begin, even inside a token; they are not part of it. They are
            normalized as the training text was: after NFKC, `…` is `...`.

    Raises:
        LumiereError: A stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(tokenizer.normalize(plain(text)) for text in stop)
        refuse_empty(self._stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Return the text that is now final; nothing after a stop string."""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> str:
        """Return the text held back; bytes that are no character become U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        return text + self._held

    def _release(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        # Hold back the longest end of the text that begins a stop string.
        overlaps = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        cut = len(text) - max(overlaps, default=0)
        self._held = text[cut:]
        return text[:cut]


def refuse_empty(stop: Sequence[str]) -> None:
    """Raise `LumiereError` if a stop string is empty."""
    if not all(stop):
        raise LumiereError("a stop string is empty", "an empty string is everywhere; leave it out")


FinishReason = Literal["eos", "length", "stop"]
"""Why a text ends: the model ended the document, after `max_new_tokens`, or at a stop string."""


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token."""

    id: int
    logprob: float | None = None
    """The model's own log-probability in nats, before all sampling controls; None if not requested."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most probable tokens and their log-probabilities, in falling order."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to a row."""

    row: int
    text: str
    """Whole characters; empty while they are not final."""
    token: Token | None
    """None if the model ended the text instead."""
    finish_reason: FinishReason | None = None
    """None while the row continues."""


@dataclass(frozen=True)
class Limits:
    """Where texts end, and what is reported about their tokens.

    Raises:
        LumiereError: A number is negative or a stop string empty.
    """

    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    """Alternatives reported for each token. 0 reports the token's own log-probability, None nothing."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise LumiereError(f"max-new-tokens must be 0 or more, not {self.max_new_tokens}", "200 is the default")
        refuse_empty(self.stop)
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
    """Stream the text that `model` generates after `prompt`, in pieces of whole characters.

    Args:
        model: In evaluation mode, on any device.
        tokenizer: The one that the model was trained with.
        prompt: The beginning of a document, not repeated in the result. None: start a document.
        max_new_tokens: Number of tokens after which the text ends, unless the model ends it earlier.
        sampling: Default: `Sampling()`.
        seed: Seed of the draws. None: a new one in every call.
        stop: Strings that end the text where they begin.

    Raises:
        LumiereError: The prompt or a stop string is empty, or `max_new_tokens` is negative.
        NonFiniteError: The model's logits are not finite, because its weights are broken.
    """
    limits = Limits(max_new_tokens, tuple(stop))
    rows = [prompt_tokens(tokenizer, prompt)]
    decoder = CachedDecoder(model, suppressed_ids(model.vocab_size, tokenizer))
    pieces = generate_pieces(decoder, tokenizer, rows, sampling or Sampling(), [row_random(seed)], limits)
    return (piece.text for piece in pieces if piece.text)


def prompt_tokens(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    """Return the tokens of the beginning of a document.

    Raises:
        LumiereError: The prompt is empty.
    """
    if prompt is not None and not prompt.strip():
        raise LumiereError("the prompt is empty", "give it some text, or leave it out to let the model begin")
    return tokenizer.encode(plain(prompt or ""), start=True)


def suppressed_ids(vocab_size: int, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that are never generated: special tokens that do not end a document, and unused ids."""
    unwanted = set(range(vocab_size)).difference(tokenizer.text_ids, tokenizer.end_ids)
    return sorted(unwanted)


def row_random(seed: int | None, prompt: int = 0, sequence: int = 0) -> Random:
    """Return the random numbers of one row, which do not depend on the rows beside it."""
    return Random() if seed is None else Random(f"{seed}/{prompt}/{sequence}")


def generate_pieces(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    randoms: Sequence[Random],
    limits: Limits,
) -> Iterator[Piece]:
    """Continue all rows at once; yield a piece for each token of each unfinished row.

    Args:
        decoder: Gives minus infinity at ids that are never generated.
        rows: The tokens of each text so far, at least one.
        randoms: One per row; each token takes one number.
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
        allowed_BV = logits_BV if repetition is None else repetition.applied(logits_BV)
        if repetition is not None and not has_finite_maxima(allowed_BV):
            hint = "raise no-repeat-ngram-size, or write fewer tokens"
            raise LumiereError("every token would repeat an n-gram", hint)
        ids = draw(allowed_BV, sampling, [randoms[row].random() for row in active])
        tokens = _tokens(logits_BV, ids, limits.num_logprobs)
        unfinished = []
        for place, (row, token) in enumerate(zip(active, tokens, strict=True)):
            stream = streams[row]
            if token.id in tokenizer.end_ids:
                yield Piece(row, stream.finish(), None, "eos")
                continue
            text = stream.push(token.id)
            if stream.is_stopped:
                yield Piece(row, text, token, "stop")
            elif num_tokens == limits.max_new_tokens:
                yield Piece(row, text + stream.finish(), token, "stop" if stream.is_stopped else "length")
            else:
                yield Piece(row, text, token)
                unfinished.append(place)
        if not unfinished:
            return
        if len(unfinished) < len(active):
            decoder.keep(unfinished)
            active, ids = [active[place] for place in unfinished], [ids[place] for place in unfinished]
            if repetition is not None:
                repetition.keep(unfinished)
        if repetition is not None:
            repetition.append(ids)
        logits_BV = checked(decoder.step(ids))


def checked(logits_BV: Tensor) -> Tensor:
    """Return the logits.

    Raises:
        NonFiniteError: A row has a NaN, plus infinity, or no finite logit.
    """
    if not has_finite_maxima(logits_BV):
        raise NonFiniteError("the model's logits are not finite numbers", "its weights are broken: retrain it")
    return logits_BV


def has_finite_maxima(logits_BV: Tensor) -> bool:
    """Return whether each row's largest logit is finite; NaN counts as the largest."""
    return isfinite(logits_BV.amax(-1).sum().item())


def _tokens(logits_BV: Tensor, ids: Sequence[int], num_logprobs: int | None) -> list[Token]:
    if num_logprobs is None:
        return [Token(token) for token in ids]
    logprobs_BV = logits_BV.cpu().double().log_softmax(-1)
    values, indices = logprobs_BV.topk(min(num_logprobs, logprobs_BV.shape[-1]), dim=-1)
    alternatives = [
        tuple((i, value) for i, value in zip(*pair, strict=True) if value > -inf)
        for pair in zip(indices.tolist(), values.tolist(), strict=True)
    ]
    own = logprobs_BV[torch.arange(len(ids)), torch.tensor(ids)].tolist()
    return [Token(*parts) for parts in zip(ids, own, alternatives, strict=True)]


@dataclass(frozen=True)
class Beam:
    """A text found by beam search."""

    tokens: tuple[int, ...]
    """After the prompt, without the end of the document."""
    score: float
    """Mean log-probability of its tokens, in nats."""
    is_ended: bool
    """Whether the model ended the document."""


def beam_search(
    decoder: Decoder,
    prompt: Sequence[int],
    num_beams: int,
    max_new_tokens: int,
    end_ids: Collection[int],
    sampling: Sampling | None = None,
) -> list[Beam]:
    """Return the `num_beams` best texts after `prompt`, best first.

    Args:
        decoder: Gives minus infinity at ids that are never generated.
        end_ids: Tokens that end a document.
        sampling: Its `repetition_penalty` and `no_repeat_ngram_size`; the penalty acts on log-probabilities.
    """
    if max_new_tokens == 0:
        return [Beam((), 0.0, is_ended=False)] * num_beams
    logits_BV = checked(decoder.start([prompt]))
    decoder.keep([0] * num_beams)
    vocab_size = logits_BV.shape[-1]
    repetition = Repetition([prompt] * num_beams, sampling or Sampling(), vocab_size, logits_BV.device)
    texts: list[tuple[int, ...]] = [()]
    sums = [0.0]
    finished: list[Beam] = []
    for length in range(1, max_new_tokens + 1):
        # Only the first step has fewer texts than beams: all begin with the same prompt.
        logprobs_BV = repetition.applied(logits_BV.log_softmax(-1))[: len(texts)]
        totals_BV = logprobs_BV + torch.tensor(sums, dtype=logprobs_BV.dtype, device=logprobs_BV.device)[:, None]
        # Each text can end in one way only, so twice as many candidates hold enough that continue.
        best = totals_BV.flatten().topk(min(2 * num_beams, totals_BV.numel()))
        candidates = [
            (total, *divmod(place, vocab_size))
            for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if total > -inf
        ]
        finished += [
            Beam(texts[parent], total / length, is_ended=True)
            for total, parent, token in candidates[:num_beams]
            if token in end_ids
        ]
        finished = sorted(finished, key=lambda beam: -beam.score)[:num_beams]
        unfinished = [candidate for candidate in candidates if candidate[2] not in end_ids][:num_beams]
        if not unfinished or (len(finished) == num_beams and unfinished[0][0] / length <= finished[-1].score):
            return finished
        sums = [total for total, _, _ in unfinished]
        texts = [(*texts[parent], token) for _, parent, token in unfinished]
        if length < max_new_tokens:
            missing = num_beams - len(unfinished)
            parents = [parent for _, parent, _ in unfinished] + [0] * missing
            tokens = [token for _, _, token in unfinished] + [unfinished[0][2]] * missing
            decoder.keep(parents)
            repetition.keep(parents)
            repetition.append(tokens)
            logits_BV = checked(decoder.step(tokens))
    finished += [Beam(text, total / max_new_tokens, is_ended=False) for text, total in zip(texts, sums, strict=True)]
    return sorted(finished, key=lambda beam: -beam.score)[:num_beams]
