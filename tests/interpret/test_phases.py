"""Phase changes: found in curves that jump, and not claimed for curves that grow evenly or are noise."""

import numpy as np
import pytest

from benchmarks.phases import births, random_walks, share_claimed, smooth_curves, snapshot_steps
from lumiere.interpret.dynamics import find_phase_change, stretches

STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 2560, 3072, 3584, 4096])


def jump(at: int, low: float = 0.03, high: float = 0.9) -> np.ndarray:
    return np.where(at > STEPS, low, high)


NOISE = np.random.default_rng(0).normal(0, 0.02, len(STEPS))
MISSING, BLIP, ENDS = (jump(512) for _ in range(3))
MISSING[:2] = np.nan
BLIP[10:] = 0.03
ENDS[3:] = np.nan
SURE = np.full(len(STEPS), 0.15)


@pytest.mark.parametrize(
    ("values", "noticeable", "errors", "ends"),
    [
        (jump(64), 0.1, None, (32, 64)),
        (jump(512), 0.1, None, (256, 512)),
        (jump(1536), 0.1, None, (1024, 1536)),
        (jump(2048), 0.1, None, (1536, 2048)),  # within the stretch of half a doubling that ends at 2,560
        (np.interp(STEPS, [1536, 2560], [0.0, 1.0]), 0.1, None, (1536, 2560)),
        (-jump(512), 0.1, None, (256, 512)),
        (jump(512) + NOISE, 0.1, None, (256, 512)),
        (MISSING, 0.1, None, (256, 512)),
        (ENDS, 0.1, None, None),
        (jump(512), 0.8, None, (256, 512)),
        (jump(512), 0.9, None, None),
        (jump(512), 0.1, SURE, (256, 512)),
        (jump(512), 0.1, SURE / 0.75, None),  # 0.87 is 3.1 errors of a difference
        (jump(512), 0.1, np.nan * SURE, (256, 512)),
        (BLIP, 0.1, None, None),  # it does not last
        (jump(1024)[:12], 0.1, None, None),  # nothing says that the rise has ended
        (jump(1024)[:13], 0.1, None, (512, 1024)),
    ],
)
def test_a_jump_is_found_where_it_is(
    values: np.ndarray, noticeable: float, errors: np.ndarray | None, ends: tuple[int, int] | None
) -> None:
    found = find_phase_change(STEPS[: len(values)], values, noticeable, errors)
    assert (found and (STEPS[found.first], STEPS[found.last])) == ends
    if found:
        assert found.change == values[found.last] - values[found.first]
        assert found.slope == pytest.approx(found.change / np.log2((1 + ends[1]) / (1 + ends[0])) if ends else 0)


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


def test_a_late_tremble_is_none() -> None:
    """Late snapshots are close in log steps; a slope between neighbours would be steep there."""
    steps = np.concatenate([STEPS[:11], np.arange(1024, 32768, 512)])
    values = 0.02 * np.log2(1 + steps)
    values[40:42] += 0.09
    assert find_phase_change(steps, values, 0.1) is None


def test_stretches_span_half_a_doubling() -> None:
    firsts, lasts = stretches(np.log2(1.0 + STEPS))
    expected = [(first, first + 1) for first in range(11)]  # up to (512, 1,024) each is about a doubling
    assert list(zip(firsts, lasts, strict=True))[:11] == expected
    for first, last in zip(firsts, lasts, strict=True):
        assert (1 + STEPS[last]) / (1 + STEPS[first]) >= 2**0.5 - 1e-6
        assert last == first + 1 or (1 + STEPS[last - 1]) / (1 + STEPS[first]) < 2**0.5
