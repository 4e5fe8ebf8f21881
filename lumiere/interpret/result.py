"""The base of all results: arrays, labels, and receipts of the invariants that were checked."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from torch import nn

from lumiere.components.short_repr import ShortRepr

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
        """All fields but the receipts, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "receipts"}

    @abstractmethod
    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield the result as a table, one observation a row (Wickham 2014, "Tidy Data")."""


def rounding(model: nn.Module) -> float:
    """Return the relative error that rounding may make in what `model` computes."""
    return FLOAT64_TOLERANCE if next(model.parameters()).dtype.itemsize == 8 else FLOAT32_TOLERANCE


def agreement(result: Result, exact: Result) -> Receipt:
    """Compare a result's numbers with those of the same analysis in float64.

    Relative to the largest number of each array. A difference that rounding does not explain is a bug, or a quantity
    that rounding decides, such as the largest of two equal numbers.
    """
    error = 0.0
    for name, values in result.arrays().items():
        if np.issubdtype(values.dtype, np.floating) and name not in result.DISCRETE:
            expected = exact.arrays()[name].astype(np.float64)
            # Equal infinities, and what is missing in both, do not differ.
            same = (values == expected) | (np.isnan(values) & np.isnan(expected))
            difference = np.where(same, 0.0, np.abs(np.where(same, 0.0, values) - np.where(same, 0.0, expected)))
            scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
            error = float(np.maximum(error, difference.max(initial=0) / scale))  # NaN, if there is one
    return Receipt("the same in float64", error, VERIFIED_TOLERANCE)
