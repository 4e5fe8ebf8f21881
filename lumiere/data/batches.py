"""Which windows a step trains on: a pure function of the seed and the step."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lumiere.components.kernels import IGNORED
from lumiere.components.short_repr import ShortRepr
from lumiere.data.tokenizer import PAD
from lumiere.errors import DataError, LumiereError

ROUNDS = 8


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where each index goes.

    Args:
        indices: (N,) integers in `range(size)`.
        size: how many numbers are permuted.
        key: chooses the permutation.

    Returns:
        (N,) int64, distinct for distinct indices.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = round_keys(key)
    images = feistel(indices.astype(np.uint64), half_bits, keys)
    # The domain is less than four times `size`, so a few walks do.
    while (outside := images >= size).any():
        images[outside] = feistel(images[outside], half_bits, keys)
    return images.astype(np.int64)


def feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass through the network: a permutation of the numbers of `2 * half_bits` bits, whatever `mix` is."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right, key) & mask)
    return (left << shift) | right


def mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's finalizer of each value and the key (Steele et al. 2014)."""
    values = values ^ key
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def round_keys(key: str) -> np.ndarray:
    """(ROUNDS,) uint64, one independent key a round."""
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")


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


@dataclass(frozen=True)
class Batch(ShortRepr):
    """Inputs, and the same shifted by one.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64, `IGNORED` where there is nothing to predict.
        num_targets: positions that are no padding, over all shares of a step where several processes share it.
        documents: (B,) which document of the split each window is cut from; None: each is a text of its own.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    num_targets: int
    documents: np.ndarray | None = None

    def to(self, device: torch.device) -> "Batch":
        return replace(self, tokens=self.tokens.to(device), targets=self.targets.to(device))

    def split(self, num_parts: int, fills: bool = False) -> list["Batch"]:
        """The same windows in at most `num_parts` smaller batches, for gradient accumulation.

        Each keeps the `num_targets` of all of them, since counting its own would wait for the device.

        Args:
            fills: give that many in any case, where windows are lacking ones without targets: processes that compute
                together need as many forward passes each.
        """
        split = zip(self.tokens.tensor_split(num_parts), self.targets.tensor_split(num_parts), strict=True)
        parts = [Batch(tokens, targets, self.num_targets) for tokens, targets in split if len(tokens)]
        filler = without_targets(Batch(self.tokens[:1], self.targets[:1], 0))
        return parts + [filler] * (num_parts - len(parts)) * fills


def make_batch(windows: Windows, indices: np.ndarray, shift: int = 0) -> Batch:
    """The windows at `indices`, cut `shift` tokens further on, as inputs and targets."""
    tokens, lengths = windows.cut(indices, shift)
    targets = tokens[:, 1:].copy()
    targets[np.arange(windows.context_size) >= lengths[:, None] - 1] = IGNORED
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        torch.from_numpy(targets),
        int(lengths.sum()) - len(lengths),
        windows.documents(indices),
    )


def documents_of(batches: Sequence[Batch]) -> np.ndarray:
    """(S,) the document of each sequence of all batches, one after the other; other numbers where it is not known."""
    found, unknown = [], -1
    for batch in batches:
        count = len(batch.tokens)
        found.append(np.arange(unknown, unknown - count, -1) if batch.documents is None else batch.documents)
        unknown -= count
    return np.concatenate(found)


def steps_per_epoch(windows: Windows, batch_size: int) -> int:
    """Steps in which every window is seen once; the last batch of an epoch may be smaller."""
    return -(-len(windows) // batch_size)


def indices_at(step: int, windows: Windows, batch_size: int, seed: int) -> np.ndarray:
    """(B,) the windows of a step, counted from 0. Each epoch is another permutation of all windows."""
    epoch, position = divmod(step, steps_per_epoch(windows, batch_size))
    first = position * batch_size
    places = np.arange(first, min(first + batch_size, len(windows)))
    return permute(places, len(windows), key=f"{seed} {epoch}")


def documents_at(step: int, windows: Windows, batch_size: int, seed: int) -> list[int]:
    """The documents that the windows of a step are cut from, by number in the split, each once and in order."""
    return np.unique(windows.documents(indices_at(step, windows, batch_size, seed))).tolist()


def batch_at(step: int, windows: Windows, batch_size: int, seed: int, rank: int = 0, num_shares: int = 1) -> Batch:
    """The batch of a step, counted from 0, without a loader's state to save.

    Args:
        rank: which share of its windows is wanted, of `num_shares`; `num_targets` counts those of all shares. Where
            there are fewer windows than shares, a share without one has a window without targets.
    """
    shift = shift_at(step // steps_per_epoch(windows, batch_size), windows.stride, seed) if windows.shifts else 0
    indices = indices_at(step, windows, batch_size, seed)
    if num_shares == 1:
        return make_batch(windows, indices, shift)
    lengths = windows.lengths(indices, shift)
    mine = np.array_split(indices, num_shares)[rank]
    share = make_batch(windows, mine, shift) if len(mine) else without_targets(make_batch(windows, indices[:1], shift))
    return Batch(share.tokens, share.targets, int(lengths.sum()) - len(lengths))


def without_targets(batch: Batch) -> Batch:
    """The batch with nothing to predict, for a process that only keeps the others company."""
    return Batch(batch.tokens, torch.full_like(batch.targets, IGNORED), 0)


def shift_at(epoch: int, stride: int, seed: int) -> int:
    """How far the windows of an epoch are shifted: any of `stride` neighbouring numbers around 0, by chance.

    Over the epochs, a token that is far from its document's ends comes to stand at every position of a window.
    """
    digest = hashlib.blake2b(f"shift {seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % stride - stride // 2


def batches_in_order(windows: Windows, batch_size: int, rank: int = 0, num_shares: int = 1) -> Iterator[Batch]:
    """Every window once, in the order of the text, as an evaluation reads them.

    Args:
        rank: of `num_shares` processes, each of which gets every `num_shares`-th batch. All get as many, because a
            model whose weights are shared out needs all processes in each forward pass: where there is no batch left
            for one, it gets a window without targets.
    """
    num_batches = steps_per_epoch(windows, batch_size)
    for number in range(rank, -(-num_batches // num_shares) * num_shares, num_shares):
        first = number * batch_size
        if number < num_batches:
            yield make_batch(windows, np.arange(first, min(first + batch_size, len(windows))))
        else:
            yield without_targets(make_batch(windows, np.zeros(1, dtype=np.int64)))
