"""Phase changes: found in curves that jump, and not claimed for curves that grow evenly or are noise."""

import numpy as np
import pytest

from benchmarks.phases import births, random_walks, share_claimed, smooth_curves, snapshot_steps
from lumiere.interpret.dynamics import find_phase_change, stretches

STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 2560, 3072, 3584, 4096])


def jump(at: int, low: float = 0.03, high: float = 0.9) -> np.ndarray:
    return np.where(at > STEPS, low, high)


@pytest.mark.parametrize("at", [64, 512, 1536])
def test_a_jump_is_found_where_it_is(at: int) -> None:
    found = find_phase_change(STEPS, jump(at), 0.1)
    assert found is not None
    assert STEPS[found.first] < at <= STEPS[found.last]
    assert found.change == pytest.approx(0.87)
    span = np.log2((1 + STEPS[found.last]) / (1 + STEPS[found.first]))
    assert found.slope == pytest.approx(0.87 / span)
    assert span > 0


def test_a_fall_is_one_too() -> None:
    found = find_phase_change(STEPS, -jump(512), 0.1)
    assert found is not None
    assert found.change == pytest.approx(-0.87)


def test_among_noise_it_is_still_found() -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, len(STEPS))
    found = find_phase_change(STEPS, jump(512) + noise, 0.1)
    assert found is not None
    assert STEPS[found.first] < 512 <= STEPS[found.last]


@pytest.mark.parametrize("last", [2048, 4096])
def test_smooth_curves_and_noise_have_none(last: int) -> None:
    """Lines, saturating curves, roots, powers and logarithms, with noise or without: at most 2 % of each."""
    steps = snapshot_steps(last)
    shares = {name: share_claimed(steps, curves) for name, curves in smooth_curves(steps, 50, seed=0).items()}
    assert {name: share for name, share in shares.items() if share > 0.02} == {}


@pytest.mark.parametrize("last", [2048, 2560, 8192])
def test_few_random_walks_have_one(last: int) -> None:
    steps = snapshot_steps(last)
    shares = {name: share_claimed(steps, curves) for name, curves in random_walks(steps, 400, seed=0).items()}
    assert {name: share for name, share in shares.items() if share > 0.05} == {}


@pytest.mark.parametrize("last", [2048, 4096])
def test_births_are_found(last: int) -> None:
    steps = snapshot_steps(last)
    shares = {name: share_claimed(steps, curves) for name, curves in births(steps, 100, seed=0).items()}
    assert {name: share for name, share in shares.items() if share < 0.75} == {}


def test_births_of_a_real_run_are_found() -> None:
    """`configs/induction.yaml`, as measured: the previous-token head, the induction head, and the repeat gap."""
    steps = np.append(STEPS[:13], [2048, 2560])
    previous = [0.07, 0.07, 0.07, 0.07, 0.07, 0.07, 0.08, 0.21, 0.38, 0.28, 0.17, 0.02, 0.02, 0.97, 0.96]
    induction = [0.03, 0.03, 0.03, 0.03, 0.03, 0.03, 0.02, 0.00, 0.01, 0.01, 0.00, 0.01, 0.02, 0.60, 0.55]
    gap = [0.00, 0.00, 0.00, 0.01, 0.01, 0.01, 0.03, 0.04, 0.05, 0.26, 0.04, 0.49, 0.88, 3.30, 3.28]
    norm = [1.27, 1.27, 1.27, 1.27, 1.28, 1.30, 1.48, 2.57, 3.20, 3.47, 3.87, 5.42, 6.05, 6.08, 5.82]
    found = [find_phase_change(steps, np.array(values), 0.1) for values in (previous, induction, gap)]
    assert [(steps[one.first], steps[one.last]) for one in found if one] == [(1536, 2048), (1536, 2048), (1024, 2048)]
    assert find_phase_change(steps, np.array(norm), 0.1) is None


def test_a_change_that_may_go_on_is_none() -> None:
    """At the end of the training nothing says that a rise has ended."""
    assert find_phase_change(STEPS[:12], jump(1024)[:12], 0.1) is None
    assert find_phase_change(STEPS[:13], jump(1024)[:13], 0.1) is not None


def test_a_late_tremble_is_none() -> None:
    """Late snapshots are close in log steps; a slope between neighbours would be steep there."""
    steps = np.concatenate([STEPS[:11], np.arange(1024, 32768, 512)])
    values = 0.02 * np.log2(1 + steps)
    values[40:42] += 0.09
    assert find_phase_change(steps, values, 0.1) is None


def test_what_does_not_last_is_none() -> None:
    values = np.full(len(STEPS), 0.03)
    values[9] = 0.9
    assert find_phase_change(STEPS, values, 0.1) is None


def test_too_small_a_change_is_none() -> None:
    assert find_phase_change(STEPS, jump(512), 0.9) is None
    assert find_phase_change(STEPS, jump(512), 0.8) is not None


def test_what_is_missing_is_passed_over() -> None:
    values = jump(512).astype(float)
    values[:2] = np.nan
    found = find_phase_change(STEPS, values, 0.1)
    assert found is not None
    assert (STEPS[found.first], STEPS[found.last]) == (256, 512)
    values[3:] = np.nan
    assert find_phase_change(STEPS, values, 0.1) is None


def test_a_change_of_a_few_standard_errors_is_none() -> None:
    errors = np.full(len(STEPS), 0.2)
    assert find_phase_change(STEPS, jump(512), 0.1, errors) is None  # 0.87 is 3.1 errors of a difference
    assert find_phase_change(STEPS, jump(512), 0.1, 0.75 * errors) is not None
    assert find_phase_change(STEPS, jump(512), 0.1, np.nan * errors) is not None


def test_the_ends_are_those_of_the_change() -> None:
    """A stretch of half a doubling from 1,536 on ends at 2,560; a change before 2,048 ends there."""
    found = find_phase_change(STEPS, jump(2048), 0.1)
    assert found is not None
    assert (STEPS[found.first], STEPS[found.last]) == (1536, 2048)
    slow = np.interp(STEPS, [1536, 2560], [0.0, 1.0])
    both = find_phase_change(STEPS, slow, 0.1)
    assert both is not None
    assert (STEPS[both.first], STEPS[both.last]) == (1536, 2560)


def test_stretches_span_half_a_doubling() -> None:
    firsts, lasts = stretches(np.log2(1.0 + STEPS))
    expected = [(first, first + 1) for first in range(11)]  # up to (512, 1,024) each is about a doubling
    assert list(zip(firsts, lasts, strict=True))[:11] == expected
    for first, last in zip(firsts, lasts, strict=True):
        assert (1 + STEPS[last]) / (1 + STEPS[first]) >= 2**0.5 - 1e-6
        assert last == first + 1 or (1 + STEPS[last - 1]) / (1 + STEPS[first]) < 2**0.5
