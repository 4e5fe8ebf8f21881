"""Receipts, and the comparison of a result with the same in float64."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from lumiere.interpret.result import Receipt, Result, agreement

NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True, kw_only=True)
class Numbers(Result):
    values: np.ndarray
    order: np.ndarray
    name: str = "numbers"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        yield from ({"value": value} for value in self.values)


def numbers(*values: float, receipts: tuple[Receipt, ...] = ()) -> Numbers:
    return Numbers(receipts=receipts, values=np.array(values), order=np.arange(len(values)))


def test_a_receipt_holds_within_its_tolerance() -> None:
    assert Receipt("law", 0.1, 0.1).holds
    assert not Receipt("law", 0.11, 0.1).holds
    assert not Receipt("law", NAN, 0.1).holds
    good, bad = Receipt("good", 0.0, 0.0), Receipt("bad", 1.0, 0.0)
    assert numbers(receipts=(good,)).holds
    assert not numbers(receipts=(good, bad)).holds


@pytest.mark.parametrize(
    ("values", "expected", "error"),
    [
        ((1.0, 2.0), (1.0, 2.0), 0.0),
        ((1.0, 3.0), (1.0, 2.0), 0.5),  # relative to the largest
        ((0.25,), (0.5,), 0.25),  # but never to less than 1
        ((INFINITY, NAN, 1.0), (INFINITY, NAN, 1.0), 0.0),
        ((INFINITY,), (1.0,), INFINITY),
        ((1.0,), (INFINITY,), INFINITY),
        ((1.0, NAN), (1.0, 2.0), NAN),
    ],
)
def test_agreement_is_the_largest_difference(
    values: tuple[float, ...], expected: tuple[float, ...], error: float
) -> None:
    assert agreement(numbers(*values), numbers(*expected)).error == pytest.approx(error, nan_ok=True)


def test_agreement_leaves_indices_alone() -> None:
    """Which of two equal numbers comes first is decided by rounding."""
    one = numbers(1.0, 1.0)
    assert agreement(one, replace(one, order=one.order[::-1])).error == 0
