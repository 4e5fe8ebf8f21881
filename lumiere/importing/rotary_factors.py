"""Find the scaling of rotary positions that factors of their periods, as GGUF files hold them, come from."""

import math
from itertools import pairwise
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lumiere.components.layers import stretch
from lumiere.config.schema import RotaryScaling

TOLERANCE = 1e-6
"""Of the ratio of two factors, times the largest factor: files hold what float32 has computed."""
USUAL_CONTEXT_SIZE = 8192
"""Of the first training of Llama 3."""


def scaling_of(factors: Tensor, periods: Tensor, original_context_size: int | None) -> dict[str, Any] | None:
    """Return the settings of `RotaryScaling` that multiply periods by these factors; None if all factors are 1.

    In the formula of Llama 3.1, share s of a pair of numbers grows linearly with its turns per token, and its factor
    is `1 / (s + (1 - s) / largest)`. Two pairs between the bands give that line. Files do not hold the original
    context size, and only its ratios to the frequency factors have an effect; so the usual one is tried first.

    Args:
        factors: (R/2,)
        periods: Positions per radian without scaling, (R/2,), in float64.
        original_context_size: If the file names it.

    Raises:
        ValueError: No such scaling has these factors.
    """
    factors = factors.double()
    largest = float(str(factors.max().float().numpy()))
    if largest == 1 and bool((factors == 1).all()):
        return None
    candidates: list[dict[str, Any]] = [{"type": "linear"}]
    sizes = [size for size in (original_context_size, USUAL_CONTEXT_SIZE) if size]
    candidates += [{"type": "llama3", "original_context_size": size} for size in sizes]
    candidates += _fitted(factors, 1 / (2 * math.pi * periods), sizes[0])
    for candidate in candidates:
        try:
            scaling = RotaryScaling.model_validate({"factor": largest, **candidate})
        except ValidationError:
            continue  # factors below 1, or not finite; a line that falls, or starts below 0
        found = torch.as_tensor(stretch(periods, scaling), dtype=torch.float64)
        if bool(((found / factors - 1).abs() <= TOLERANCE * largest).all()):
            return scaling.model_dump(exclude_defaults=True)
    raise ValueError("the factors are neither equal nor those of Llama 3.1")


def _fitted(factors: Tensor, turns: Tensor, context_size: int) -> list[dict[str, Any]]:
    """Return settings of `llama3` by lines through two pairs of numbers between the bands, or at their edges.

    Args:
        turns: Per token, (R/2,).
    """
    share = (1 / factors - 1 / factors.max()) / (1 - 1 / factors.max())
    points = sorted(zip(turns.tolist(), share.tolist(), strict=True))
    inside = [point for point in points if TOLERANCE < point[1] < 1 - TOLERANCE]
    below = [point for point in points if point[1] <= TOLERANCE][-1:]
    above = [point for point in points if point[1] >= 1 - TOLERANCE][:1]
    lines = [(inside[0], inside[-1])] if len(inside) > 1 else pairwise([*below, *inside, *above])
    found: list[dict[str, Any]] = []
    for (first, start), (second, end) in lines:
        if end <= start or second <= first:
            continue
        slope = (end - start) / (second - first)
        low = context_size * (first - start / slope)
        found.append(
            {
                "type": "llama3",
                "original_context_size": context_size,
                "low_frequency_factor": low,
                "high_frequency_factor": low + context_size / slope,
            }
        )
    return found
