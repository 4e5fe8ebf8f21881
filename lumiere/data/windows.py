"""Documents cut into overlapping windows of `context_size + 1` tokens; a window never crosses a document."""

import os
from functools import cached_property
from pathlib import Path

import numpy as np

from lumiere.data.tokenizer import PAD
from lumiere.errors import DataError, LumiereError

COUNT_TYPE = np.dtype(np.int64)
DOCUMENTS_AT_ONCE = 2**20
"""Documents whose windows are counted in memory; of more, the counts are kept in a file."""


class Windows:
    """The windows of a split, addressed by index and cut only when they are asked for.

    Args:
        ids: (num_tokens,) all documents one after the other.
        offsets: (num_documents + 1,) where each document starts in `ids`, and where the last one ends.
        context_size: inputs of a window; with the targets it spans one token more.
        sliding_window_size: tokens that a window shares with the one before it in the same document.
        shifts: whether `batch_at` cuts them at other places in each epoch.
        vocab_size: ids are less than this; None where that is known.
        path: of the split's files, without their endings, where they come from a file.
    """

    def __init__(
        self,
        ids: np.ndarray,
        offsets: np.ndarray,
        context_size: int,
        sliding_window_size: int,
        shifts: bool = False,
        vocab_size: int | None = None,
        path: Path | None = None,
    ) -> None:
        self.ids = ids
        self.offsets = offsets
        self.context_size = context_size
        self.sliding_window_size = sliding_window_size
        self.shifts = shifts
        self._vocab_size = vocab_size
        self._path = path

    @property
    def stride(self) -> int:
        """Tokens from the start of a window to the start of the next."""
        return self.context_size + 1 - self.sliding_window_size

    @cached_property
    def _ends(self) -> np.ndarray:
        """(num_documents,) windows of all documents up to and with each one; from a file where they are many."""
        num_documents = len(self.offsets) - 1
        if self._path is None or num_documents <= DOCUMENTS_AT_ONCE:
            return self._count(0, num_documents)
        path = self._path.with_name(f"{self._path.name}.windows-{self.context_size}-{self.sliding_window_size}")
        if not path.is_file() or path.stat().st_size != num_documents * COUNT_TYPE.itemsize:
            self._write_ends(path, num_documents)
        return np.asarray(np.memmap(path, dtype=COUNT_TYPE, mode="r"))

    def _write_ends(self, path: Path, num_documents: int) -> None:
        # Of this process' own name: two may write at once, and both write the same.
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                before = 0
                for first in range(0, num_documents, DOCUMENTS_AT_ONCE):
                    ends = before + self._count(first, min(first + DOCUMENTS_AT_ONCE, num_documents))
                    file.write(ends.tobytes())
                    before = int(ends[-1])
            os.replace(temporary, path)
        except OSError as error:
            raise LumiereError(
                f"the cache {str(path.parent)!r} cannot be written: {error.strerror}", "set LUMIERE_CACHE_DIR"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _count(self, first: int, last: int) -> np.ndarray:
        """(last - first,) windows of the documents from `first` on, up to and with each one."""
        lengths = np.diff(self.offsets[first : last + 1])
        if lengths.min() < 1:
            raise self._damaged("a document without a token")
        beyond_first = lengths - (self.context_size + 1)
        # Without overlap a single token left over has nothing before it to be predicted from.
        needed = beyond_first - (self.sliding_window_size == 0)
        return np.cumsum(1 + np.maximum(-(-needed // self.stride), 0), dtype=COUNT_TYPE)

    def _damaged(self, what: str) -> DataError:
        where = "the encoded text" if self._path is None else f"the cached corpus in {str(self._path.parent)!r}"
        return DataError(f"{where} is damaged: it has {what}", "delete that folder")

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def padding_share(self) -> float:
        """Share of the positions of an epoch that are padding. Shifted windows are padded in short documents only."""
        num_targets, before = 0, 0
        for first in range(0, len(self.offsets) - 1, DOCUMENTS_AT_ONCE):
            documents = slice(first, first + DOCUMENTS_AT_ONCE)
            lengths = np.diff(self.offsets[first : first + DOCUMENTS_AT_ONCE + 1])
            ends = self._ends[documents]
            counts = np.diff(ends, prepend=before)
            before = int(ends[-1])
            # All windows of a document but the last are full.
            last = np.minimum(lengths - (counts - 1) * self.stride, self.context_size + 1)
            if self.shifts:
                last = np.where(counts > 1, self.context_size + 1, last)
            num_targets += int(((counts - 1) * self.context_size + last - 1).sum())
        return 1 - num_targets / (len(self) * self.context_size)

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
        start, lengths = self._place(indices, shift)
        column = np.arange(self.context_size + 1)
        real = column < lengths[:, None]
        # Positions beyond a document are read from its first token and then overwritten.
        tokens = self.ids[np.where(real, start[:, None] + column, start[:, None])].astype(np.int64)
        if self._vocab_size is not None and tokens.max() >= self._vocab_size:
            raise self._damaged(f"the id {tokens.max()}, which is none of its tokenizer's")
        tokens[~real] = PAD
        return tokens, lengths

    def lengths(self, indices: np.ndarray, shift: int = 0) -> np.ndarray:
        """(N,) how many tokens of each window are real, without reading them; arguments as those of `cut`."""
        return self._place(indices, shift)[1]

    def _place(self, indices: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the windows at `indices` start in `ids`, and how many tokens of each are real: (N,) both."""
        document = self.documents(indices)
        first_window = np.where(document > 0, self._ends[document - 1], 0)
        start = self.offsets[document] + (indices - first_window) * self.stride
        if shift:
            last = np.maximum(self.offsets[document + 1] - (self.context_size + 1), self.offsets[document])
            start = np.clip(start + shift, self.offsets[document], last)
        return start, np.minimum(self.context_size + 1, self.offsets[document + 1] - start)
