"""What a model sees of a text, and the plainest decoder: a full forward pass for every token.

The window slides in steps. Learned positions end at `context_size`, so a text that goes on past it must lose its
beginning, and then all that is left stands at other positions and is computed anew. Losing one token each time would
make every token cost a whole window. So when the window is full, its last `context_size // 2` tokens are kept and the
text goes on from there: one window of work for every half window of text.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lumiere.models.transformer import Transformer


class Decoder(Protocol):
    """Rows of text that grow by a token at a time. Each has a window of its own: neighbours do not matter."""

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these texts, each of at least one token; the logits of each row's next token, (B, V)."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; the logits of each row's next token, (B, V), valid until the next call."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may be named more than once."""
        ...


def first_window(tokens: Sequence[int], context_size: int) -> list[int]:
    """What the model sees of a text that it is to continue: its last `context_size` tokens."""
    return list(tokens[-context_size:])


def kept_when_full(window: Sequence[int], context_size: int) -> list[int]:
    """What stays of a full window before the next token is appended: its last `context_size // 2` tokens."""
    return list(window[len(window) - context_size // 2 :])


def suppression(vocab_size: int, suppressed: Collection[int], like: Tensor) -> Tensor:
    """What to add to logits, (V,): minus infinity for the ids that never come, zero for the others."""
    bias_V = like.new_zeros(vocab_size)
    bias_V[list(suppressed)] = -torch.inf
    return bias_V


class FullForward:
    """The slow decoder: `model.logits` over each row's whole window, every time. What the cache is checked against.

    Args:
        model: in evaluation mode.
        suppressed: ids that never come.
    """

    def __init__(self, model: Transformer, suppressed: Collection[int] = ()) -> None:
        self._model = model
        self._like = next(model.parameters())
        self._suppressed = suppressed
        self._windows: list[list[int]] = []

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._windows = [first_window(row, self._model.context_size) for row in rows]
        return self._logits()

    def step(self, tokens: Sequence[int]) -> Tensor:
        context_size = self._model.context_size
        for i, token in enumerate(tokens):
            window = self._windows[i]
            self._windows[i] = [
                *(kept_when_full(window, context_size) if len(window) == context_size else window),
                token,
            ]
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self._windows = [self._windows[row] for row in rows]

    @torch.no_grad()
    def _logits(self) -> Tensor:
        device = self._like.device
        logits = [self._model.logits(torch.tensor([window], device=device))[0, -1] for window in self._windows]
        logits_BV = torch.stack(logits)
        return logits_BV + suppression(logits_BV.shape[-1], self._suppressed, logits_BV)
