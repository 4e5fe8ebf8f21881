"""A curve in one line of text."""

import math
from collections.abc import Sequence

LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """One character a value, from the lowest of them to the highest; a flat curve is low. What is no number is a space.

    Args:
        low, high: the ends of the scale, where several curves share one.
    """
    numbers = [value for value in values if math.isfinite(value)]
    low = min(numbers, default=0.0) if low is None else low
    high = max(numbers, default=0.0) if high is None else high
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(LEVELS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)
