"""The base of all results: arrays, labels and receipts of the checked invariants; and helpers of the analyses.

An analysis is a pure function of a model in evaluation mode, a text and options.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lumiere.components.kernels import IGNORED
from lumiere.components.short_repr import ShortRepr
from lumiere.data.batches import PADDING, Batch

FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-10
VERIFIED_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Receipt:
    """An invariant that a result must satisfy, with its error.

    Attributes:
        check: in words, such as "rows sum to 1".
        error: the deviation; 0 is exact.
        tolerance: the largest error that rounding explains.
    """

    check: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # false for NaN

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt as it stands in JSON."""
        return {"law": self.check, "error": self.error, "tolerance": self.tolerance, "holds": self.holds}


@dataclass(frozen=True, kw_only=True)
class Result(ShortRepr, ABC):
    """The base of all results. Subclasses are frozen dataclasses too.

    Attributes:
        receipts: the checks with their errors.
        DISCRETE: names of arrays that rounding may change by a whole step, such as which of two numbers is larger.
    """

    receipts: tuple[Receipt, ...]
    DISCRETE: ClassVar[frozenset[str]] = frozenset()

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(receipt.holds for receipt in self.receipts)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fields that are arrays, by name."""
        return {name: value for name, value in self.as_dict().items() if isinstance(value, np.ndarray)}

    def as_dict(self) -> dict[str, Any]:
        """Return all fields except the receipts, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "receipts"}

    @abstractmethod
    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield the result as a table, one observation per row (Wickham 2014, "Tidy Data")."""


def table(axes: Mapping[str, Sequence[Any]], **columns: Any) -> Iterator[dict[str, Any]]:
    """Yield a row for each place of a grid: its label on each axis, then the value of each column there.

    Args:
        columns: Arrays that broadcast to the shape of the grid.
    """
    shape = tuple(map(len, axes.values()))
    arrays = {name: np.broadcast_to(values, shape) for name, values in columns.items()}
    for place in np.ndindex(*shape):
        labels = {name: labels[index] for (name, labels), index in zip(axes.items(), place, strict=True)}
        yield labels | {name: values.item(place) for name, values in arrays.items()}


def agreement(result: Result, exact: Result) -> Receipt:
    """Compare a result's numbers with those of the same analysis in float64.

    Relative to the largest number of each array. A difference that rounding does not explain is a bug, or a quantity
    that rounding decides, such as the largest of two equal numbers.
    """
    error = 0.0
    for name, values in result.arrays().items():
        if np.issubdtype(values.dtype, np.floating) and name not in result.DISCRETE:
            expected = exact.arrays()[name].astype(np.float64)
            scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
            error = float(np.maximum(error, largest_difference(values, expected) / scale))  # NaN, if there is one
    return Receipt("the same in float64", error, VERIFIED_TOLERANCE)


def largest_difference(values: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference; equal infinities, and NaN in both, do not differ."""
    same = (values == expected) | (np.isnan(values) & np.isnan(expected))
    return float(np.abs(np.where(same, 0.0, values) - np.where(same, 0.0, expected)).max(initial=0.0))


def relative_error(values: Tensor, expected: Tensor, least: float = 1.0) -> float:
    """Return the largest difference, relative to the largest expected value, or to `least` if that is larger."""
    return float((values - expected).abs().max() / expected.abs().max().clamp(min=least))


def outside_unit(values: np.ndarray) -> float:
    """Return how far the values leave the interval from 0 to 1; NaN is ignored."""
    return float(np.nanmax(np.abs(values - 0.5), initial=0.5) - 0.5)


def rounding(model: nn.Module) -> float:
    """Return the relative error that rounding may make in what `model` computes."""
    return FLOAT64_TOLERANCE if next(model.parameters()).dtype.itemsize == 8 else FLOAT32_TOLERANCE


def one_sequence(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """Return ids as a batch of one sequence, (1, T), on the model's device."""
    return torch.tensor([list(tokens)], device=next(model.parameters()).device)


def float64(tensor: Tensor) -> np.ndarray:
    """Return the values of a tensor on any device in float64."""
    return tensor.detach().cpu().double().numpy()


def selected(indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Return the chosen indices; all `count` of them for None."""
    return tuple(range(count) if indices is None else indices)


def whole_rows(batch: Batch) -> np.ndarray:
    """Return the inputs and the last target, (B, T + 1); `PADDING` for a target that is ignored."""
    last_B1 = batch.targets[:, -1:]
    return torch.cat([batch.tokens, last_B1.where(last_B1 != IGNORED, PADDING)], dim=1).cpu().numpy()


def real_rows(batch: Batch) -> list[tuple[int, ...]]:
    """Return the inputs of each sequence without padding, and its last target unless that is ignored."""
    last_B1 = batch.targets[:, -1:]
    tokens, is_real = torch.cat([batch.tokens, last_B1], dim=1), torch.cat([batch.is_real, last_B1 != IGNORED], dim=1)
    return [tuple(row[real].tolist()) for row, real in zip(tokens, is_real, strict=True)]
