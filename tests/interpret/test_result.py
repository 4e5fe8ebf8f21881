"""Receipts, and the comparison of a result with the same in float64."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from torch import nn

from lumiere.interpret.result import Receipt, Result, agreement, rounding

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


def test_a_result_holds_if_all_its_receipts_do() -> None:
    good, bad = Receipt("good", 0.0, 0.0), Receipt("bad", 1.0, 0.0)
    assert numbers(receipts=(good,)).holds
    assert not numbers(receipts=(good, bad)).holds


def test_arrays_are_the_fields_that_are_arrays() -> None:
    assert list(numbers(1.0).arrays()) == ["values", "order"]
    assert "receipts" not in numbers(1.0).as_dict()


@pytest.mark.parametrize(
    ("values", "expected", "error"),
    [
        ((1.0, 2.0), (1.0, 2.0), 0.0),
        ((1.0, 3.0), (1.0, 2.0), 0.5),  # relative to the largest
        ((0.25,), (0.5,), 0.25),  # but never to less than 1
        ((INFINITY, NAN, 1.0), (INFINITY, NAN, 1.0), 0.0),
        ((INFINITY,), (1.0,), INFINITY),
        ((1.0,), (INFINITY,), INFINITY),
    ],
)
def test_agreement_is_the_largest_difference(
    values: tuple[float, ...], expected: tuple[float, ...], error: float
) -> None:
    assert agreement(numbers(*values), numbers(*expected)).error == error


def test_one_missing_number_is_no_agreement() -> None:
    assert not agreement(numbers(1.0, NAN), numbers(1.0, 2.0)).holds


def test_agreement_leaves_indices_alone() -> None:
    """Which of two equal numbers comes first is decided by rounding."""
    one = numbers(1.0, 1.0)
    assert agreement(one, replace(one, order=one.order[::-1])).error == 0


def test_rounding_follows_the_type_of_the_weights() -> None:
    model = nn.Linear(2, 2)
    assert rounding(model) > rounding(model.double())
