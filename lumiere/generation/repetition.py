"""What a text already has, held against the logits of its next token.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from lumiere.generation.sampling import Sampling


class Repetition:
    """The repetition penalty and the ban on n-grams that come again, for rows of text that grow.

    A step costs the same however long the texts are.

    Args:
        rows: the texts so far.
        sampling: its `repetition_penalty` and `no_repeat_ngram_size`.
        vocab_size: of the logits.
        device: where the logits are.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], sampling: Sampling, vocab_size: int, device: torch.device
    ) -> None:
        self._penalty = sampling.repetition_penalty or 1.0
        self._size = sampling.no_repeat_ngram_size
        self._is_seen_BV = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
        self._ngrams = [_Ngrams(self._size) for _ in rows] if self._size is not None else []
        for i, row in enumerate(rows):
            self._is_seen_BV[i, list(row)] = True
            for ngrams in self._ngrams[i : i + 1]:
                ngrams.extend(row)

    def applied(self, logits_BV: Tensor) -> Tensor:
        """The logits after penalty and bans."""
        if self._penalty != 1:
            weakened_BV = torch.where(logits_BV < 0, logits_BV * self._penalty, logits_BV / self._penalty)
            logits_BV = torch.where(self._is_seen_BV, weakened_BV, logits_BV)
        banned = [(i, token) for i, ngrams in enumerate(self._ngrams) for token in ngrams.banned()]
        if banned:
            rows, tokens = zip(*banned, strict=True)
            logits_BV = logits_BV.clone()
            logits_BV[list(rows), list(tokens)] = -torch.inf
        return logits_BV

    def append(self, tokens: Sequence[int]) -> None:
        """One more token of each row."""
        self._is_seen_BV[range(len(tokens)), list(tokens)] = True
        for ngrams, token in zip(self._ngrams, tokens, strict=bool(self._ngrams)):
            ngrams.extend([token])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may be named more than once."""
        self._is_seen_BV = self._is_seen_BV[list(rows)]
        if self._ngrams:
            self._ngrams = [deepcopy(self._ngrams[row]) for row in rows]


class _Ngrams:
    """The n-grams of a text, by their first n - 1 tokens."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._last: tuple[int, ...] = ()
        self._followers: dict[tuple[int, ...], set[int]] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if len(self._last) == self._size - 1:
                self._followers.setdefault(self._last, set()).add(token)
            self._last = (*self._last, token)[max(0, len(self._last) + 2 - self._size) :]

    def banned(self) -> set[int]:
        """The tokens that would complete an n-gram that the text has."""
        return self._followers.get(self._last, set()) if len(self._last) == self._size - 1 else set()
