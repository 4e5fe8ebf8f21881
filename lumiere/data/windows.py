"""Documents cut into overlapping windows of `context_size + 1` tokens; a window never crosses a document."""

from functools import cached_property

import numpy as np

from lumiere.data.tokenizer import PAD


class Windows:
    """The windows of a split, addressed by index and cut only when they are asked for.

    Args:
        ids: (num_tokens,) all documents one after the other.
        offsets: (num_documents + 1,) where each document starts in `ids`, and where the last one ends.
        context_size: inputs of a window; with the targets it spans one token more.
        sliding_window_size: tokens that a window shares with the one before it in the same document.
        shifts: whether `batch_at` cuts them at other places in each epoch.
    """

    def __init__(
        self,
        ids: np.ndarray,
        offsets: np.ndarray,
        context_size: int,
        sliding_window_size: int,
        shifts: bool = False,
    ) -> None:
        self.ids = ids
        self.offsets = offsets
        self.context_size = context_size
        self.sliding_window_size = sliding_window_size
        self.shifts = shifts

    @property
    def stride(self) -> int:
        """Tokens from the start of a window to the start of the next."""
        return self.context_size + 1 - self.sliding_window_size

    @cached_property
    def _ends(self) -> np.ndarray:
        """(num_documents,) windows of all documents up to and with each one."""
        beyond_first = np.diff(self.offsets) - (self.context_size + 1)
        # Without overlap a single token left over has nothing before it to be predicted from.
        needed = beyond_first - (self.sliding_window_size == 0)
        return np.cumsum(1 + np.maximum(-(-needed // self.stride), 0))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """(N,) the document that each window is cut from."""
        return np.searchsorted(self._ends, indices, side="right")

    def cut(self, indices: np.ndarray, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The windows at `indices`.

        Args:
            shift: how many tokens further on, or back, to cut. Windows stay within their document, and then end where
                it ends, instead of being padded.

        Returns:
            tokens: (N, context_size + 1) int64, padded at the end with `PAD`.
            lengths: (N,) how many of them are real.
        """
        document = self.documents(indices)
        first_window = np.where(document > 0, self._ends[document - 1], 0)
        start = self.offsets[document] + (indices - first_window) * self.stride
        if shift:
            last = np.maximum(self.offsets[document + 1] - (self.context_size + 1), self.offsets[document])
            start = np.clip(start + shift, self.offsets[document], last)
        lengths = np.minimum(self.context_size + 1, self.offsets[document + 1] - start)
        column = np.arange(self.context_size + 1)
        real = column < lengths[:, None]
        # Positions beyond a document are read from its first token and then overwritten.
        tokens = self.ids[np.where(real, start[:, None] + column, start[:, None])].astype(np.int64)
        tokens[~real] = PAD
        return tokens, lengths
