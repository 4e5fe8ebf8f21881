"""Which windows a step trains on: a pure function of the seed and the step."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lumiere.components.kernels import IGNORED
from lumiere.components.short_repr import ShortRepr
from lumiere.data.permutation import permute
from lumiere.data.windows import Windows


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
