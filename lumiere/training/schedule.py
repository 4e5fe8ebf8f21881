"""The learning rate of each step, as a share of its peak."""

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    total_steps: int,
    warmup_steps: int,
    schedule: Literal["cosine", "linear", "constant"],
    decay_fraction: float = 1.0,
) -> float:
    """The share of the peak learning rate that the update number `step` uses.

    The rate rises in a line and is at its peak at update `warmup_steps`; from there, or for the last `decay_fraction`
    of the way, it falls so that the update after the last one would have rate zero. Cosine: Loshchilov & Hutter 2017,
    "SGDR"; a peak that lasts and then a fall: Hu et al. 2024, "MiniCPM", section 4.

    Args:
        step: the update, counted from 1.
        total_steps: updates of the whole training.
        warmup_steps: updates of the warm-up.
        schedule: what follows the warm-up.
        decay_fraction: share of what follows in which the rate falls, above 0; without effect on `constant`.

    Returns:
        A number in (0, 1].
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (total_steps + 1 - warmup_steps) if step > warmup_steps else 0.0
    progress = max(0.0, progress - (1.0 - decay_fraction)) / decay_fraction
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))


def unfinished_warmup(warmup_steps: int, total_steps: int) -> str | None:
    """What to warn of if the warm-up is longer than training; None if it is not."""
    if warmup_steps <= total_steps:
        return None
    return (
        f"training.warmup_steps={warmup_steps} exceeds the {total_steps:,} steps of training: the learning rate rises "
        f"to {total_steps / warmup_steps:.0%} of its peak and never decays"
    )
