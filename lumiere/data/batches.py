"""Windows of documents, and which of them a step trains on: a pure function of the seed and the step."""

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
from lumiere.errors import DataError, LumiereError

PADDING = 2
"""Id at padding: `<|pad|>` of Lumiere's tokenizers. Elsewhere it may be a token, so go by `is_real` and `IGNORED`."""
ROUNDS = 8
"""Rounds of the Feistel network."""
COUNT_TYPE = np.dtype(np.int64)
DOCUMENTS_AT_ONCE = 2**20
"""Maximum number of documents whose window counts are kept in memory; beyond it, they are kept in a file."""


@dataclass(eq=False, repr=False)
class Windows:
    """Documents cut into overlapping windows of `context_size + 1` tokens, on demand and by index.

    A window never crosses a document.

    Attributes:
        ids: (num_tokens,), all documents concatenated.
        offsets: (num_documents + 1,), where each document starts in `ids`, and where the last one ends.
        context_size: Inputs of a window; with the targets it spans one token more.
        sliding_window_size: Tokens shared with the previous window of the document.
        shifts: Whether `batch_at` shifts the windows each epoch.
        only_last: Each document has one window, which ends with its last token of text, and that token is the only
            target: `training.loss_positions: last`. Documents without a token before it have no window.
        vocab_size: Ids are checked to be less than this; None if they are known to be.
        path: Path of the split's files without their endings, if it has files.
    """

    ids: np.ndarray
    offsets: np.ndarray
    context_size: int
    sliding_window_size: int
    shifts: bool = False
    vocab_size: int | None = None
    path: Path | None = None
    only_last: bool = False

    @property
    def stride(self) -> int:
        """Tokens between the starts of consecutive windows."""
        return self.context_size + 1 - self.sliding_window_size

    @cached_property
    def _ends(self) -> np.ndarray:
        """(num_documents,), cumulative number of windows; memory-mapped if there are many documents."""
        num_documents = len(self.offsets) - 1
        if self.path is None or num_documents <= DOCUMENTS_AT_ONCE:
            return self._count(0, num_documents)
        kind = "last" if self.only_last else f"{self.context_size}-{self.sliding_window_size}"
        path = self.path.with_name(f"{self.path.name}.windows-{kind}")
        if not path.is_file() or path.stat().st_size != num_documents * COUNT_TYPE.itemsize:
            self._write_ends(path, num_documents)
        return np.asarray(np.memmap(path, dtype=COUNT_TYPE, mode="r"))

    def _write_ends(self, path: Path, num_documents: int) -> None:
        # Named after the process: two may write at once, and both write the same.
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
            problem = f"the cache {str(path.parent)!r} cannot be written: {error.strerror}"
            raise LumiereError(problem, "set LUMIERE_CACHE_DIR") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _count(self, first: int, last: int) -> np.ndarray:
        """Return the cumulative number of windows of documents `first` to `last` (exclusive)."""
        lengths = np.diff(self.offsets[first : last + 1])
        if lengths.min() < 1:
            raise self._damaged("a document without a token")
        if self.only_last:
            return np.cumsum(lengths > 2, dtype=COUNT_TYPE)
        beyond_first = lengths - (self.context_size + 1)
        # Without overlap, a single leftover token has no token before it to be predicted from.
        needed = beyond_first - (self.sliding_window_size == 0)
        return np.cumsum(1 + np.maximum(-(-needed // self.stride), 0), dtype=COUNT_TYPE)

    def _damaged(self, what: str) -> DataError:
        where = "the encoded text" if self.path is None else f"the cached corpus in {str(self.path.parent)!r}"
        return DataError(f"{where} is damaged: it has {what}", "delete that folder")

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def padding_share(self) -> float:
        """Fraction of the positions of an epoch that are padding."""
        num_targets, before = 0, 0
        for first in range(0, len(self.offsets) - 1, DOCUMENTS_AT_ONCE):
            lengths = np.diff(self.offsets[first : first + DOCUMENTS_AT_ONCE + 1])
            ends = self._ends[first : first + DOCUMENTS_AT_ONCE]
            counts = np.diff(ends, prepend=before)
            before = int(ends[-1])
            if self.only_last:
                num_targets += int(np.minimum(lengths - 2, self.context_size)[counts > 0].sum())
                continue
            # All windows of a document but the last are full; shifted ones are padded in short documents only.
            last = np.minimum(lengths - (counts - 1) * self.stride, self.context_size + 1)
            if self.shifts:
                last = np.where(counts > 1, self.context_size + 1, last)
            num_targets += int(((counts - 1) * self.context_size + last - 1).sum())
        return 1 - num_targets / (len(self) * self.context_size)

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """Return the document of each window, (N,)."""
        return np.searchsorted(self._ends, indices, side="right")

    def cut(self, indices: np.ndarray, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the windows at `indices`.

        Args:
            shift: Number of tokens to move the windows by, forward or back. They stay within their document, and end
                where it ends instead of being padded.

        Returns:
            tokens: (N, context_size + 1) int64, padded at the end with `PADDING`.
            lengths: (N,), number of real tokens.
        """
        start, lengths = self._place(indices, shift)
        column = np.arange(self.context_size + 1)
        real = column < lengths[:, None]
        # Positions beyond a document are read from its first token, then overwritten.
        tokens = self.ids[np.where(real, start[:, None] + column, start[:, None])].astype(np.int64)
        if self.vocab_size is not None and tokens.max() >= self.vocab_size:
            raise self._damaged(f"the id {tokens.max()}, which its tokenizer does not have")
        tokens[~real] = PADDING
        return tokens, lengths

    def lengths(self, indices: np.ndarray, shift: int = 0) -> np.ndarray:
        """Return the number of real tokens of each window, (N,), without reading them. Arguments as in `cut`."""
        return self._place(indices, shift)[1]

    def num_targets(self, lengths: np.ndarray) -> int:
        """Return the number of targets of windows with these numbers of real tokens, (N,)."""
        return len(lengths) if self.only_last else int(lengths.sum()) - len(lengths)

    def _place(self, indices: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where each window starts in `ids`, and its number of real tokens: (N,) both."""
        document = self.documents(indices)
        if self.only_last:
            end = self.offsets[document + 1] - 1  # of the text: only the end token follows
            start = np.maximum(end - (self.context_size + 1), self.offsets[document])
            return start, end - start
        first_window = np.where(document > 0, self._ends[document - 1], 0)
        start = self.offsets[document] + (indices - first_window) * self.stride
        if shift:
            last = np.maximum(self.offsets[document + 1] - (self.context_size + 1), self.offsets[document])
            start = np.clip(start + shift, self.offsets[document], last)
        return start, np.minimum(self.context_size + 1, self.offsets[document + 1] - start)


@dataclass(frozen=True)
class Batch(ShortRepr):
    """Inputs and targets, which are the inputs shifted by one.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64, `IGNORED` where there is nothing to predict.
        num_targets: Number of targets, over all ranks that share the step.
        documents: (B,), document of the split that each window is from. None: each is a text of its own.
        lengths: (B,), number of tokens before the padding. None: there is no padding.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    num_targets: int
    documents: np.ndarray | None = None
    lengths: np.ndarray | None = None

    @property
    def is_real(self) -> torch.Tensor:
        """(B, T) bool, on the device of the tokens: False at padding."""
        if self.lengths is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        lengths_B1 = torch.from_numpy(self.lengths)[:, None]
        return (torch.arange(self.tokens.shape[1]) < lengths_B1).to(self.tokens.device)

    def to(self, device: torch.device) -> "Batch":
        return replace(self, tokens=self.tokens.to(device), targets=self.targets.to(device))

    def split(self, num_parts: int, fills: bool = False) -> list["Batch"]:
        """Split into at most `num_parts` micro-batches, for gradient accumulation.

        Each keeps the `num_targets` of all of them, since counting its own would wait for the device.

        Args:
            fills: Return exactly `num_parts`, filling up with fully masked batches: ranks that compute together need
                the same number of forward passes.
        """
        split = zip(self.tokens.tensor_split(num_parts), self.targets.tensor_split(num_parts), strict=True)
        parts = [Batch(tokens, targets, self.num_targets) for tokens, targets in split if len(tokens)]
        filler = without_targets(Batch(self.tokens[:1], self.targets[:1], 0))
        return parts + [filler] * (num_parts - len(parts)) * fills


def make_batch(windows: Windows, indices: np.ndarray, shift: int = 0) -> Batch:
    """Return the windows at `indices`, moved by `shift` tokens, as inputs and targets."""
    tokens, lengths = windows.cut(indices, shift)
    targets = tokens[:, 1:].copy()
    columns = np.arange(windows.context_size)
    targets[columns >= lengths[:, None] - 1] = IGNORED
    if windows.only_last:
        targets[columns < lengths[:, None] - 2] = IGNORED
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        torch.from_numpy(targets),
        windows.num_targets(lengths),
        windows.documents(indices),
        lengths,
    )


def without_targets(batch: Batch) -> Batch:
    """Return the batch with every target masked, for a rank without data."""
    return Batch(batch.tokens, torch.full_like(batch.targets, IGNORED), 0)


def documents_of(batches: Sequence[Batch]) -> np.ndarray:
    """Return the document of each sequence of all batches, (S,); unique negative numbers where unknown."""
    found, unknown = [], -1
    for batch in batches:
        count = len(batch.tokens)
        found.append(np.arange(unknown, unknown - count, -1) if batch.documents is None else batch.documents)
        unknown -= count
    return np.concatenate(found)


def steps_per_epoch(windows: Windows, batch_size: int) -> int:
    """Return the number of steps that see every window once; the last batch may be smaller."""
    return -(-len(windows) // batch_size)


def indices_at(step: int, windows: Windows, batch_size: int, seed: int) -> np.ndarray:
    """Return the windows of a step, (B,), counted from 0. Each epoch permutes all windows anew."""
    epoch, position = divmod(step, steps_per_epoch(windows, batch_size))
    first = position * batch_size
    places = np.arange(first, min(first + batch_size, len(windows)))
    return permute(places, len(windows), key=f"{seed} {epoch}")


def documents_at(step: int, windows: Windows, batch_size: int, seed: int) -> list[int]:
    """Return the numbers of the documents in the windows of a step, sorted and unique."""
    return np.unique(windows.documents(indices_at(step, windows, batch_size, seed))).tolist()


def batch_at(step: int, windows: Windows, batch_size: int, seed: int, rank: int = 0, num_shares: int = 1) -> Batch:
    """Return the batch of a step, counted from 0. There is no loader state to save.

    Args:
        rank: Which of `num_shares` shares of its windows to return. `num_targets` counts those of all shares. If there
            are fewer windows than shares, a share without one gets a window with all targets masked.
    """
    shift = shift_at(step // steps_per_epoch(windows, batch_size), windows.stride, seed) if windows.shifts else 0
    indices = indices_at(step, windows, batch_size, seed)
    if num_shares == 1:
        return make_batch(windows, indices, shift)
    lengths = windows.lengths(indices, shift)
    mine = np.array_split(indices, num_shares)[rank]
    share = make_batch(windows, mine, shift) if len(mine) else without_targets(make_batch(windows, indices[:1], shift))
    return Batch(share.tokens, share.targets, windows.num_targets(lengths))


def shift_at(epoch: int, stride: int, seed: int) -> int:
    """Return the window offset of an epoch: uniform among the `stride` integers around 0.

    Over the epochs, a token far from the ends of its document appears at every position of a window.
    """
    digest = hashlib.blake2b(f"shift {seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % stride - stride // 2


def batches_in_order(windows: Windows, batch_size: int, rank: int = 0, num_shares: int = 1) -> Iterator[Batch]:
    """Yield every window once in the order of the text, for evaluation.

    Args:
        rank: Rank among `num_shares` processes, each of which gets every `num_shares`-th batch. All get the same
            number, because sharded models need all ranks in every forward pass: a rank without a batch gets a window
            with all targets masked.
    """
    num_batches = steps_per_epoch(windows, batch_size)
    for number in range(rank, -(-num_batches // num_shares) * num_shares, num_shares):
        first = number * batch_size
        if number < num_batches:
            yield make_batch(windows, np.arange(first, min(first + batch_size, len(windows))))
        else:
            yield without_targets(make_batch(windows, np.zeros(1, dtype=np.int64)))


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Permute `range(size)`, index by index and in constant memory.

    A balanced Feistel network permutes a range of 4^k numbers; an image outside `range(size)` is permuted again until
    it falls inside ("cycle-walking", Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). The order of an
    epoch is therefore never stored, saved, or sent to other processes.

    Args:
        indices: (N,), integers in `range(size)`.
        key: Selects the permutation.

    Returns:
        (N,) int64, distinct for distinct indices.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")
    images = feistel(indices.astype(np.uint64), half_bits, keys)
    # The domain is less than four times `size`, so a few walks suffice.
    while (outside := images >= size).any():
        images[outside] = feistel(images[outside], half_bits, keys)
    return images.astype(np.int64)


def feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """Pass through the network: a permutation of the integers of `2 * half_bits` bits, whatever `mix` is."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right, key) & mask)
    return (left << shift) | right


def mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Apply SplitMix64's finalizer (Steele et al. 2014) to each value and the key."""
    values = values ^ key
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
