"""Verdicts: against Student's t and Holm's procedure of other libraries, and tables by hand."""

import numpy as np
import pytest
from scipy import stats

from lumiere.interpret.claims import FAIL, PASS, UNDECIDED, Bound, Estimate, decide, joint_verdict, student_quantile


@pytest.mark.parametrize("freedom", [7, 10, 30, 400])
@pytest.mark.parametrize("p", [0.9, 0.975, 0.995, 0.9995])
def test_quantiles_are_those_of_scipy(p: float, freedom: int) -> None:
    assert student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=3e-3)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.5, 0.9, PASS), (0.2, 0.4, FAIL), (0.4, 0.6, UNDECIDED), (0.5, 0.5, PASS), (np.nan, np.nan, UNDECIDED)],
)
def test_a_verdict_is_that_of_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Bound(0.5, np.inf).verdict(low, high) == verdict
    assert Bound(-np.inf, -0.5).verdict(-high, -low) == verdict


def test_no_effect_is_an_equivalence_and_not_a_lack_of_significance() -> None:
    """An interval that contains 0 but is wide decides nothing; a narrow one away from 0 may be no effect."""
    within = Bound(-0.1, 0.1)
    assert within.verdict(-0.5, 0.5) == UNDECIDED
    assert within.verdict(0.02, 0.05) == PASS
    assert within.verdict(0.2, 0.5) == FAIL


def test_several_claims_are_decided_as_by_holm() -> None:
    """Against p values, one-sided for each direction at half of alpha: decided where Holm rejects one of the two."""
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        shifts = draw.normal(size=6) * 4
        estimates = [Estimate(float(shift), 1.0, 41) for shift in shifts]
        found = decide(estimates, [Bound(0.0, np.inf)] * 6, 0.95, holm=True)
        p = 2 * stats.t.sf(np.abs(shifts), 40)
        rejected, order = np.zeros(6, dtype=bool), np.argsort(p)
        for rank, number in enumerate(order):
            if p[number] > 0.05 / (6 - rank):
                break
            rejected[number] = True
        assert [decision.verdict != UNDECIDED for decision in found] == rejected.tolist()
        assert [decision.verdict for decision in np.array(found, dtype=object)[rejected]] == [
            PASS if shift > 0 else FAIL for shift in shifts[rejected]
        ]
        seen.add(int(rejected.sum()))
    assert len(seen) > 4
    alone = decide([Estimate(2.1, 1.0, 41)] * 6, [Bound(0.0, np.inf)] * 6, 0.95, holm=False)
    assert {decision.verdict for decision in alone} == {PASS}


def test_what_draws_nothing_is_exact() -> None:
    [decision] = decide([Estimate(1.3, 0.0, 0)], [Bound(1.2, np.inf)], 0.95, holm=True)
    assert (decision.low, decision.high, decision.verdict) == (1.3, 1.3, PASS)


@pytest.mark.parametrize(
    ("verdicts", "required", "expected"),
    [
        ([PASS, PASS, PASS], 3, PASS),
        ([PASS, PASS, FAIL], 3, FAIL),
        ([PASS, PASS, FAIL], 2, PASS),
        ([PASS, UNDECIDED, FAIL], 2, UNDECIDED),
        ([UNDECIDED, PASS, PASS], 3, UNDECIDED),
        ([FAIL, FAIL, PASS], 2, FAIL),
    ],
)
def test_so_many_of_the_runs_have_to_pass(verdicts: list[str], required: int, expected: str) -> None:
    assert joint_verdict(verdicts, required) == expected
