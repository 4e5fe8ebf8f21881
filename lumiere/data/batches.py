"""Which windows a step trains on: a pure function of the seed and the step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lumiere.data.permutation import permute
from lumiere.data.windows import Windows

IGNORED = -100
"""Target of a position that is padding; `cross_entropy` leaves it out."""


@dataclass(frozen=True)
class Batch:
    """Inputs, and the same shifted by one.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64, `IGNORED` where there is nothing to predict.
        num_targets: positions that are no padding.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    num_targets: int

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens.to(device), self.targets.to(device), self.num_targets)

    def split(self, num_parts: int) -> list["Batch"]:
        """The same windows in at most `num_parts` smaller batches, for gradient accumulation."""
        parts = zip(self.tokens.tensor_split(num_parts), self.targets.tensor_split(num_parts), strict=True)
        return [Batch(tokens, targets, int((targets != IGNORED).sum())) for tokens, targets in parts if len(tokens)]


def make_batch(windows: Windows, indices: np.ndarray) -> Batch:
    """The windows at `indices` as inputs and targets."""
    tokens, lengths = windows.cut(indices)
    targets = tokens[:, 1:].copy()
    targets[np.arange(windows.context_size) >= lengths[:, None] - 1] = IGNORED
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        torch.from_numpy(targets),
        int(lengths.sum()) - len(lengths),
    )


def steps_per_epoch(windows: Windows, batch_size: int) -> int:
    """Steps in which every window is seen once; the last batch of an epoch may be smaller."""
    return -(-len(windows) // batch_size)


def indices_at(step: int, windows: Windows, batch_size: int, seed: int) -> np.ndarray:
    """(B,) the windows of a step, counted from 0. Each epoch is another permutation of all windows."""
    epoch, position = divmod(step, steps_per_epoch(windows, batch_size))
    first = position * batch_size
    places = np.arange(first, min(first + batch_size, len(windows)))
    return permute(places, len(windows), key=f"{seed} {epoch}")


def batch_at(step: int, windows: Windows, batch_size: int, seed: int) -> Batch:
    """The batch of a step, counted from 0, without a loader's state to save."""
    return make_batch(windows, indices_at(step, windows, batch_size, seed))


def batches_in_order(windows: Windows, batch_size: int) -> Iterator[Batch]:
    """Every window once, in the order of the text, as an evaluation reads them."""
    for first in range(0, len(windows), batch_size):
        yield make_batch(windows, np.arange(first, min(first + batch_size, len(windows))))
