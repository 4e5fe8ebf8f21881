"""Intervals by resampling prompts: the percentile bootstrap (Efron 1979), of ratios of sums.

A normalized effect is a ratio of two sums over prompts, never a mean of ratios, which explodes where a single prompt
has a denominator near 0.

Shapes: B prompt, G group of prompts, R resample, any axes before B.
"""

from typing import NamedTuple

import numpy as np

from lumiere.errors import LumiereError

RESAMPLES = 1000
LEVEL = 0.95
FEWEST = 8
"""Groups below which there is no interval."""


class Interval(NamedTuple):
    """A value and its interval, each of the same shape; without enough groups, the limits are NaN."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def resampled_counts(groups_B: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray | None:
    """Return how often each prompt occurs in each resample of whole groups, (R, B); None for too few groups."""
    names, numbers_B = np.unique(groups_B, return_inverse=True)
    if len(names) < FEWEST:
        return None
    drawn_RG = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return drawn_RG[:, numbers_B].astype(np.float64)


def sum_interval(values: np.ndarray, groups_B: np.ndarray, seed: int = 0, level: float = LEVEL) -> Interval:
    """Return the sum over prompts of (..., B), with its interval."""
    total = values.sum(-1)
    counts_RB = resampled_counts(groups_B, seed)
    if counts_RB is None:
        return Interval(total, *np.full((2, *total.shape), np.nan))
    return Interval(total, *limits(values @ counts_RB.T, level))


def ratio_interval(
    numerators: np.ndarray,
    denominators: np.ndarray,
    groups_B: np.ndarray,
    seed: int = 0,
    level: float = LEVEL,
    least: float = 0.0,
) -> Interval:
    """Return `sum(numerators) / sum(denominators)` over prompts, with an interval; both are resampled together.

    Args:
        numerators: (..., B).
        denominators: (B,) or as `numerators`.
        least: What rounding may make of a mean denominator of 0.

    Raises:
        LumiereError: The interval of the denominator contains 0; with too few groups for one, the sum is 0 or not
            finite.
    """
    below = sum_interval(denominators, groups_B, seed, level)
    low, high = (below.value, below.value) if np.isnan(below.low).all() else (below.low, below.high)
    bound = least * len(groups_B)
    if not bool(((low > bound) | (high < -bound)).all() & np.isfinite(below.value).all()):
        mean = float(np.ravel(below.value)[0]) / len(groups_B)
        raise LumiereError(
            f"the clean and the corrupt prompts differ by {mean:.3g} on average: too little to divide by",
            "choose prompts between which the metric changes, or other tokens",
        )
    value = numerators.sum(-1) / below.value
    counts_RB = resampled_counts(groups_B, seed)
    if counts_RB is None:
        return Interval(value, *np.full((2, *value.shape), np.nan))
    return Interval(value, *limits((numerators @ counts_RB.T) / (denominators @ counts_RB.T), level))


def limits(resampled: np.ndarray, level: float) -> np.ndarray:
    """Return both percentiles over the last axis, (2, ...)."""
    return np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=-1)
