"""The phase change of a curve over steps: where it is steepest, and whether that is more than noise or slow growth.

Shapes: N snapshot.
"""

from dataclasses import dataclass

import numpy as np

SPAN = 0.5
"""The shortest stretch over which a slope is taken, in doublings of the step: over less, late noise looks steep."""
STEEPNESS = 6.0
"""How many times as steep as the median of the others the steepest stretch has to be."""
BEFORE = 2.0
"""How far back, in doublings, the level before is taken: what came much earlier was lower for other reasons."""
LASTING = 0.5
"""The share of the change that has to last."""


SURE = 4.0
"""How many standard errors the change has to have."""
KEPT = 0.9
"""The share of the change that stays when the ends are drawn in."""


@dataclass(frozen=True)
class PhaseChange:
    """The steepest stretch of a curve.

    Attributes:
        first, last: its first and its last snapshot, by index.
        change: of the value from the one to the other.
        slope: change a doubling of the step.
    """

    first: int
    last: int
    change: float
    slope: float


def find_phase_change(
    steps_N: np.ndarray, values_N: np.ndarray, noticeable: float, errors_N: np.ndarray | None = None
) -> PhaseChange | None:
    """The phase change of a curve, or None where none is to be claimed.

    It is the stretch of two snapshots with the steepest slope over log2(1 + step), among all that begin at a snapshot
    and end at the first one half a doubling later. It is claimed if the value changes there by `noticeable` at least,
    and by four times its standard error where that is known; if it is six times as steep as the median of the stretches
    that do not overlap it, which slow growth and noise are not; and if half of the change lasts: the medians of the
    values in the two doublings up to it and of all those after it differ by so much, in the same direction.

    Olsson et al. 2022, "In-context Learning and Induction Heads", call the birth of induction heads a phase change and
    mark it by eye; the rule is ours. Of curves of 18 snapshots that are nothing but noise, `noticeable` apart, it takes
    one in forty for a phase change (tests/interpret/test_phases.py). Fewer than four snapshots have none.

    The ends of what was found are then drawn in, as long as nine tenths of the change stay between them.

    Args:
        steps_N: rising.
        values_N: NaN where there is none.
        noticeable: the least change, in the unit of the values.
        errors_N: standard errors of the values, NaN where they are not known.
    """
    places = np.flatnonzero(np.isfinite(values_N))
    if len(places) < 4:
        return None
    positions, values = np.log2(1.0 + steps_N[places]), values_N[places]
    firsts, lasts = stretches(positions)
    slopes = (values[lasts] - values[firsts]) / (positions[lasts] - positions[firsts])
    steepest = int(np.abs(slopes).argmax())
    first, last = int(firsts[steepest]), int(lasts[steepest])
    change = float(values[last] - values[first])
    errors = np.zeros(len(places)) if errors_N is None else np.nan_to_num(errors_N[places])
    others = np.abs(slopes[(lasts <= first) | (firsts >= last)])
    before = positions[: first + 1] >= positions[first] - BEFORE
    lasting = float(np.median(values[last:]) - np.median(values[: first + 1][before])) * np.sign(change)
    if (
        abs(change) < max(noticeable, SURE * float(np.hypot(errors[first], errors[last])))
        or not len(others)
        or abs(slopes[steepest]) < STEEPNESS * np.median(others)
        or lasting < LASTING * abs(change)
    ):
        return None
    first, last = drawn_in(values, first, last)
    change = float(values[last] - values[first])
    slope = change / float(positions[last] - positions[first])
    return PhaseChange(int(places[first]), int(places[last]), change, slope)


def drawn_in(values_N: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """The shortest part of a stretch, from its ends inwards, that keeps `KEPT` of its change."""
    least = KEPT * abs(values_N[last] - values_N[first])
    while last - first > 1 and abs(values_N[last - 1] - values_N[first]) >= least:
        last -= 1
    while last - first > 1 and abs(values_N[last] - values_N[first + 1]) >= least:
        first += 1
    return first, last


def stretches(positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each begins and where it ends: at the first snapshot `SPAN` later; the last ones have none."""
    lasts = np.searchsorted(positions_N, positions_N + SPAN - 1e-9)
    firsts = np.flatnonzero(lasts < len(positions_N))
    return firsts, lasts[firsts]
