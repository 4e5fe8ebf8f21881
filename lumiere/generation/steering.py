"""Steering: add a direction to the residual stream while text is generated.

Shapes: B row, T position, E embedding_size.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lumiere.components.hooks import Hook, Place, hook_points, hooked, with_place
from lumiere.generation.kv_cache import Decoder, slide
from lumiere.models.transformer import Transformer


class Steering:
    """Adds a vector to the residual stream after blocks, at all positions of a text from `first` on.

    The positions are those of the text, so that the edit is the same in a cached step and in a full forward pass.

    Args:
        added: (E,) by layer, what is added to the output of the block.
        first: 1 leaves out the start token.
    """

    def __init__(self, added: Mapping[int, Tensor], first: int = 1) -> None:
        self.added = added
        self.first = first
        self.num_edits = 0
        """Rows x positions x layers that have been changed."""
        self.num_expected = 0
        """The same, counted from the rows that the decoder was given."""
        self.hooks: Mapping[str, Hook] = {
            f"blocks.{layer}.hook_resid_post": with_place(self._adding(vector_E)) for layer, vector_E in added.items()
        }

    def _adding(self, vector_E: Tensor):
        def add(resid_BTE: Tensor, place: Place) -> Tensor:
            is_steered_BT1 = (place.in_text >= self.first)[..., None]
            self.num_edits += int(is_steered_BT1.sum())
            return resid_BTE + is_steered_BT1 * vector_E.to(resid_BTE)

        return add

    @property
    def holds(self) -> bool:
        """Whether it has acted wherever it should have."""
        return self.num_edits == self.num_expected


class SteeredDecoder:
    """A decoder whose passes are steered; it counts where steering must act, from the rows alone.

    Args:
        decoder: A `CachedDecoder` of the model, or a `FullForward`, for which the count does not hold.
    """

    def __init__(self, decoder: Decoder, model: Transformer, steering: Steering) -> None:
        self._decoder, self._model, self._steering = decoder, model, steering
        self._points = hook_points(model)
        self._windows: list[list[int]] = []
        self._num_tokens: list[int] = []

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._windows = [list(row[-self._model.context_size :]) for row in rows]
        self._num_tokens = list(map(len, rows))
        self._expect()
        with hooked(self._model, self._steering.hooks, self._points):
            return self._decoder.start(rows)

    def step(self, tokens: Sequence[int]) -> Tensor:
        if slide(self._windows, self._model.context_size):
            self._expect()  # the cache is filled again
        for row, (window, token) in enumerate(zip(self._windows, tokens, strict=True)):
            window.append(token)
            self._num_tokens[row] += 1
        self._expect(newest=1)
        with hooked(self._model, self._steering.hooks, self._points):
            return self._decoder.step(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        self._windows = [list(self._windows[row]) for row in rows]
        self._num_tokens = [self._num_tokens[row] for row in rows]
        self._decoder.keep(rows)

    def _expect(self, newest: int | None = None) -> None:
        """Count the positions of a pass over the windows, or over their newest tokens."""
        for window, length in zip(self._windows, self._num_tokens, strict=True):
            begin = length - (newest or len(window))
            steered = length - max(begin, self._steering.first)
            self._steering.num_expected += max(0, steered) * len(self._steering.added)
