"""The Hungarian method against all assignments there are."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumiere.interpret.model_diff import cheapest_assignment


def least_cost(costs: np.ndarray) -> float:
    if len(costs) > costs.shape[1]:
        costs = costs.T
    rows = np.arange(len(costs))
    return min(costs[rows, list(columns)].sum() for columns in permutations(range(costs.shape[1]), len(costs)))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000), st.sampled_from(["real", "ties", "negative"]))
def test_no_assignment_is_cheaper(num_rows: int, num_columns: int, seed: int, kind: str) -> None:
    draw = np.random.default_rng(seed)
    costs = (
        draw.integers(0, 3, (num_rows, num_columns)) if kind == "ties" else draw.normal(size=(num_rows, num_columns))
    )
    costs = np.abs(costs) if kind == "real" else costs
    before = costs.copy()
    pairs = cheapest_assignment(costs)
    assert len(pairs) == min(costs.shape)
    assert all(len(set(side)) == len(pairs) for side in pairs.T.tolist())
    assert pairs[:, 0].tolist() == sorted(pairs[:, 0])
    assert costs[tuple(pairs.T)].sum() == pytest.approx(least_cost(costs))
    assert np.array_equal(costs, before)


def test_greedy_choices_are_undone() -> None:
    """The first row's cheapest column is the only one that the second can afford."""
    assert cheapest_assignment(np.array([[1.0, 2.0], [1.0, 9.0]])).tolist() == [[0, 1], [1, 0]]


def test_a_permutation_is_found_among_many() -> None:
    order = np.random.default_rng(0).permutation(60)
    costs = np.ones((60, 60))
    costs[np.arange(60), order] = 0
    assert cheapest_assignment(costs)[:, 1].tolist() == order.tolist()


def test_costs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        cheapest_assignment(np.array([[np.nan, 1.0]]))
