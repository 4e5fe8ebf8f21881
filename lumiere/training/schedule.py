"""What happens at which step: the learning rate, evaluations, the end, and the snapshots that are kept."""

import math
from typing import Literal

from lumiere.config.schema import TrainingConfig


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


def num_steps(settings: TrainingConfig, epoch_steps: int) -> int:
    """Steps of a training that patience does not end sooner."""
    return settings.max_steps or settings.max_epochs * epoch_steps


def num_evaluations(settings: TrainingConfig, epoch_steps: int) -> int:
    """Evaluations of that training: at the ends of epochs, every `eval_interval`, and at the last step."""
    total_steps = num_steps(settings, epoch_steps)
    intervals = {epoch_steps, settings.eval_interval or epoch_steps}
    before_the_last = total_steps - 1
    due = sum(before_the_last // interval for interval in intervals)
    both = before_the_last // math.lcm(*intervals) if len(intervals) > 1 else 0
    return due - both + 1


def earliest_stop(settings: TrainingConfig, epoch_steps: int) -> int | None:
    """The step at which patience could end that training at the earliest; None where it cannot end it sooner.

    The first epoch sets the loss that the following ones fail to beat.
    """
    if settings.patience is None:
        return None
    step = (settings.patience + 1) * epoch_steps
    return step if step < num_steps(settings, epoch_steps) else None


LAST_POWER = 512
MAX_LATER = 64


def spacing(step: int) -> int:
    """The distance between the later snapshots once training has come to `step`."""
    distance = LAST_POWER
    while step > distance * MAX_LATER:
        distance *= 2
    return distance


def is_snapshot(step: int, reached: int) -> bool:
    """Whether the snapshot of `step` is kept when training has come to the step `reached`."""
    if step <= LAST_POWER:
        return step & (step - 1) == 0
    return step % spacing(reached) == 0


def most_snapshots(total_steps: int) -> int:
    """The most snapshots that a training of `total_steps` ever keeps at once: at its end, or when they were full."""

    def kept(reached: int) -> int:
        powers = 1 + min(reached, LAST_POWER).bit_length()  # step 0 is one too
        return powers + max(0, reached // spacing(reached) - LAST_POWER // spacing(reached))

    last_full = spacing(total_steps) // 2 * MAX_LATER
    return max(kept(total_steps), kept(min(total_steps, last_full)))
