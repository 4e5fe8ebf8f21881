"""The learning rate of each step, as a share of its peak."""

import math
from typing import Literal


def learning_rate_factor(
    step: int, total_steps: int, warmup_steps: int, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """The share of the peak learning rate that the update number `step` uses.

    The rate rises in a line and is at its peak at update `warmup_steps`; from there it falls so that the update
    after the last one would have rate zero. Cosine: Loshchilov & Hutter 2017, "SGDR".

    Args:
        step: the update, counted from 1.
        total_steps: updates of the whole training.
        warmup_steps: updates of the warm-up.
        schedule: what follows the warm-up.

    Returns:
        A number in (0, 1].
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (total_steps + 1 - warmup_steps) if step > warmup_steps else 0.0
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
