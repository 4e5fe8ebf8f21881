"""Small programs over sequences, from which `lumiere.lab.compiler` builds a model.

A program is a graph of operations in the manner of RASP (Weiss et al. 2021, "Thinking Like Transformers") and of tracr
(Lindner et al. 2023, arXiv:2301.05062). Each gives every position a vector: one-hot, or numbers.

Shapes: W width of an operation, N neurons, Vocab vocab_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Operation:
    """A vector for each position.

    Attributes:
        width: Numbers in the vector.
    """

    width: int

    @property
    def inputs(self) -> tuple["Operation", ...]:
        """What the operation reads."""
        return ()

    @property
    def varies(self) -> bool:
        """Whether the vectors depend on the tokens: positions alone are the same in every prompt."""
        return any(operation.varies for operation in self.inputs)


@dataclass(frozen=True, eq=False)
class Tokens(Operation):
    """One-hot tokens."""

    @property
    def varies(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Indices(Operation):
    """One-hot positions."""


@dataclass(frozen=True, eq=False)
class Aggregate(Operation):
    """A head: the mean of `value` over the positions before and at each query, weighted by the softmax of scores.

    Attributes:
        value: What is averaged.
        projection: (width of the value, W); None: the value itself.
        query, key: What the scores are made of; None: every key has the same score.
        scores: (query width, key width): `query @ scores @ key` is the score.
    """

    value: Operation
    projection: Tensor | None = None
    query: tuple[Operation, ...] = ()
    key: tuple[Operation, ...] = ()
    scores: Tensor | None = None

    @property
    def inputs(self) -> tuple[Operation, ...]:
        return (self.value, *self.query, *self.key)


@dataclass(frozen=True, eq=False)
class Map(Operation):
    """A function of one position: `down @ relu(sum of up @ input + offset)`.

    Attributes:
        sources: What the function reads.
        up: (N, width of the source), one for each source.
        offset: (N,).
        down: (W, N).
    """

    sources: tuple[Operation, ...]
    up: tuple[Tensor, ...]
    offset: Tensor
    down: Tensor

    @property
    def inputs(self) -> tuple[Operation, ...]:
        return self.sources


def select(query: Operation, key: Operation, scores: Tensor, value: Operation) -> Aggregate:
    """Return the mean of `value`, weighted by `softmax(query @ scores @ key)`."""
    return Aggregate(value.width, value, None, (query,), (key,), scores)


def attend(indices: Operation, offsets: Sequence[tuple[int, int]], value: Operation, sharpness: float) -> Aggregate:
    """Return `value` at chosen positions: for each pair (query, key) of positions, a score of `sharpness`."""
    scores = torch.zeros(indices.width, indices.width)
    for query, key in offsets:
        scores[query, key] = sharpness
    return select(indices, indices, scores, value)


def average(value: Operation, projection: Tensor | None = None) -> Aggregate:
    """Return the mean of `value @ projection` over all positions up to each one."""
    return Aggregate(value.width if projection is None else projection.shape[1], value, projection)


def table(source: Operation, outputs: Tensor) -> Map:
    """Return row i of `outputs`, (width of the source, W), where the source is the one-hot vector i."""
    size = source.width
    return Map(outputs.shape[1], (source,), (torch.eye(size),), torch.zeros(size), outputs.T)


def table_of_two(first: Operation, second: Operation, outputs: Tensor) -> Map:
    """Return `outputs[i, j]`, (widths of the sources, W), where the sources are the one-hot vectors i and j."""
    up_first = torch.eye(first.width).repeat_interleave(second.width, dim=0)
    up_second = torch.eye(second.width).repeat(first.width, 1)
    offset = torch.full((len(up_first),), -1.0)
    return Map(outputs.shape[2], (first, second), (up_first, up_second), offset, outputs.flatten(0, 1).T)


def piecewise(sources: Sequence[Operation], factors: Sequence[float], corners: Sequence[tuple[float, float]]) -> Map:
    """Return `sum of slope * relu(z - corner)` of the number `z = sum of factor * source`.

    Args:
        sources: Of width 1.
        factors: One for each source.
        corners: Pairs (corner, slope).
    """
    at, slopes = torch.tensor(corners).T
    up = tuple(torch.full((len(at), 1), factor) for factor in factors)
    return Map(1, tuple(sources), up, -at, slopes[None])
