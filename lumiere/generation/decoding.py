"""Text, token by token.

Shapes: B rows, V vocabulary.
"""

import codecs
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
from lumiere.generation.kv_cache import CachedDecoder, Decoder
from lumiere.generation.sampling import Repetition, Sampling, draw
from lumiere.models.transformer import Transformer


class TextStream:
    """The text of a row of tokens, given out as soon as it is certain.

    Args:
        tokenizer: the one that the model was trained with.
        stop: strings that end the text where they begin, wherever tokens are cut; they are not part of it. They are
            normalized as the training text was: after NFKC, `…` is `...`.

    Raises:
        LumiereError: if a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(tokenizer.normalize(plain(text)) for text in stop)
        if not all(self._stop):
            raise LumiereError("a stop string is empty", "an empty string is everywhere; leave it out")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; empty once a stop string has come."""
        return self._take(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> str:
        """What was held back, now that no token comes; bytes that are no character become U+FFFD."""
        text = self._take(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _take(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        cut = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


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


@dataclass(frozen=True)
class Beam:
    """A text that the search has found.

    Attributes:
        tokens: what comes after the prompt, without the end of the document.
        score: mean log of probability of its tokens, in nats.
        is_ended: whether the model ended the document.
    """

    tokens: tuple[int, ...]
    score: float
    is_ended: bool


def beam_search(
    decoder: Decoder, prompt: Sequence[int], num_beams: int, max_new_tokens: int, sampling: Sampling | None = None
) -> list[Beam]:
    """The `num_beams` best texts after `prompt`, best first.

    Args:
        decoder: its logits are minus infinity at ids that may not come.
        sampling: its `repetition_penalty` and `no_repeat_ngram_size`; the penalty acts on logs of probability.

    Raises:
        LumiereError: there is less than one beam.
    """
    if num_beams < 1:
        raise LumiereError(f"there must be at least 1 beam, not {num_beams}", "4 are common")
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
        # Each text can end in one way only, so twice as many candidates hold enough that go on.
        best = totals_BV.flatten().topk(min(2 * num_beams, totals_BV.numel()))
        going: list[tuple[float, int, int]] = []
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(place, vocab_size)
            if total == -torch.inf:
                continue
            if token != EOT:
                going.append((total, parent, token))
            elif rank < num_beams:
                finished.append(Beam(texts[parent], total / length, is_ended=True))
        going = going[:num_beams]
        finished = sorted(finished, key=lambda beam: -beam.score)[:num_beams]
        if not going or (len(finished) == num_beams and going[0][0] / length <= finished[-1].score):
            return finished
        sums = [total for total, _, _ in going]
        texts = [(*texts[parent], token) for _, parent, token in going]
        if length < max_new_tokens:
            missing = num_beams - len(going)
            parents = [parent for _, parent, _ in going] + [0] * missing
            tokens = [token for _, _, token in going] + [going[0][2]] * missing
            decoder.keep(parents)
            repetition.keep(parents)
            repetition.append(tokens)
            logits_BV = checked(decoder.step(tokens))
    finished += [Beam(text, total / max_new_tokens, is_ended=False) for text, total in zip(texts, sums, strict=True)]
    return sorted(finished, key=lambda beam: -beam.score)[:num_beams]
