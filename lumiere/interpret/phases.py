"""The phase change of a curve over steps: a fast rise or fall between two levels, not noise or smooth growth.

Shapes: N snapshot.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SPAN = 0.5
"""The shortest stretch over which a slope is taken, in doublings of the step: over less, late noise looks steep."""
STEEPNESS = 6.0
"""How many times as steep, over log2 steps, as the median of the other stretches the steepest one has to be."""
FASTER = 2.0
"""How many times as fast, over steps, the change has to be as the curve is just before and just after it."""
LEVEL = 0.18
"""The share of the change by which the curve may depart, per doubling of the step, from where the change starts and
ends."""
LONGEST = 1.0
"""The longest change, in doublings of the step; where snapshots are further apart, two intervals between them."""
AFTER = 0.5
"""How long the curve has to continue after the change, as a share of the steps that the change took."""
SURE = 4.0
"""How many standard errors the change has to have."""
LEAST_VALUES = 4
"""Curves of fewer values are not searched."""
KEPT = 0.8
"""The share of the steepest stretch's change that has to lie between the ends that are reported."""


@dataclass(frozen=True)
class PhaseChange:
    """A fast change between two levels.

    Attributes:
        first, last: the snapshots where it starts and ends, by index.
        change: of the value from the one to the other.
        slope: change per doubling of the step.
    """

    first: int
    last: int
    change: float
    slope: float


def find_phase_change(
    steps_N: np.ndarray, values_N: np.ndarray, noticeable: float, errors_N: np.ndarray | None = None
) -> PhaseChange | None:
    """Return the phase change of a curve, or None if none can be claimed.

    The search starts from the steepest stretch over log2(1 + step), among all that start at a snapshot and end at the
    first one half a doubling later. It must be six times as steep as the median of the stretches that do not overlap
    it. Candidates are the pairs of snapshots around it that are at most a doubling apart, or two intervals, and contain
    80 % of its change. A candidate is a phase change if

    - the value changes by `noticeable` and by four standard errors, where these are known;
    - over steps, it is twice as fast as the curve is just before and just after, for as many steps as it took itself;
    - before and after, the curve stays within 18 % of the change per doubling from where the change starts and ends,
      and within 18 % in the doubling next to it;
    - the curve continues for half as many steps as the change took.

    A straight line fails the second and third condition: it is steepest at its end over log steps, but as fast before.
    Of the candidates that pass, the fastest over steps is returned. Curves of fewer than four values have none.

    Olsson et al. 2022, "In-context Learning and Induction Heads", call the birth of induction heads a phase change and
    mark it by eye; the rule is ours. `benchmarks/phases.py` measures how often it is wrong.

    Args:
        steps_N: rising.
        values_N: NaN where the value is unknown.
        noticeable: the smallest change to report, in the unit of the values.
        errors_N: standard errors of the values, NaN where unknown.
    """
    places = np.flatnonzero(np.isfinite(values_N))
    if len(places) < LEAST_VALUES:
        return None
    steps, values = steps_N[places].astype(float), values_N[places]
    positions = np.log2(1.0 + steps)
    firsts, lasts = stretches(positions)
    slopes = (values[lasts] - values[firsts]) / (positions[lasts] - positions[firsts])
    steepest = int(np.abs(slopes).argmax())
    start, end = int(firsts[steepest]), int(lasts[steepest])
    others = np.abs(slopes[(lasts <= start) | (firsts >= end)])
    if not len(others) or abs(slopes[steepest]) < STEEPNESS * np.median(others):
        return None
    rising = values * np.sign(slopes[steepest])
    errors = np.zeros(len(places)) if errors_N is None else np.nan_to_num(errors_N[places])
    least = max(noticeable, KEPT * float(rising[end] - rising[start]))
    found = [
        ((rising[last] - rising[first]) / (steps[last] - steps[first]), first, last)
        for first, last in candidates(steps, positions, start, end)
        if rising[last] - rising[first] >= max(least, SURE * float(np.hypot(errors[first], errors[last])))
        and is_faster(steps, positions, rising, first, last)
        and is_between_levels(positions, rising, first, last)
    ]
    if not found:
        return None
    _, first, last = max(found)
    change = float(values[last] - values[first])
    slope = change / float(positions[last] - positions[first])
    return PhaseChange(int(places[first]), int(places[last]), change, slope)


def candidates(steps_N: np.ndarray, positions_N: np.ndarray, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The pairs of snapshots that overlap a stretch, are close enough, and have a snapshot before and enough after."""
    for first in range(1, end):
        for last in range(max(first, start) + 1, len(steps_N) - 1):
            if last > first + 2 and positions_N[last] - positions_N[first] > LONGEST:
                break
            if steps_N[-1] - steps_N[last] >= AFTER * (steps_N[last] - steps_N[first]):
                yield first, last


def is_faster(steps_N: np.ndarray, positions_N: np.ndarray, values_N: np.ndarray, first: int, last: int) -> bool:
    """Whether a curve changes faster, over steps, between two snapshots than before and after them."""

    def rate(start: int, end: int) -> float:
        return abs(values_N[end] - values_N[start]) / (steps_N[end] - steps_N[start])

    length = steps_N[last] - steps_N[first]
    # Before and after, over as many steps and at least over half a doubling, as far as the curve goes.
    earlier = (positions_N <= positions_N[first] - SPAN) & (steps_N <= steps_N[first] - length)
    later = (positions_N >= positions_N[last] + SPAN) & (steps_N >= steps_N[last] + length)
    before = int(np.flatnonzero(earlier)[-1]) if earlier.any() else 0
    after = int(np.flatnonzero(later)[0]) if later.any() else len(steps_N) - 1
    return rate(first, last) >= FASTER * max(rate(before, first), rate(last, after))


def is_between_levels(positions_N: np.ndarray, values_N: np.ndarray, first: int, last: int) -> bool:
    """Whether a curve, before and after a change, stays near the values where the change starts and ends."""
    allowed = LEVEL * (values_N[last] - values_N[first])
    before = np.abs(values_N[:first] - values_N[first]) <= allowed * np.maximum(
        positions_N[first] - positions_N[:first], 1
    )
    after = np.abs(values_N[last:] - values_N[last]) <= allowed * np.maximum(positions_N[last:] - positions_N[last], 1)
    return bool(before.all() and after.all())


def stretches(positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each begins and where it ends: at the first snapshot `SPAN` later; the last ones have none."""
    lasts = np.searchsorted(positions_N, positions_N + SPAN - 1e-9)
    firsts = np.flatnonzero(lasts < len(positions_N))
    return firsts, lasts[firsts]
