"""Schedules: learning rate, evaluations, the last step, and which snapshots are kept.

Snapshots are kept at powers of two up to 512 (Biderman et al. 2023, "Pythia"), then evenly, with at most 64 later ones.
When these are full, the spacing doubles and every other one is removed.
"""

import math

from lumiere.config.schema import TrainingConfig

LAST_POWER = 512
MAX_LATER = 64


def learning_rate_factor(step: int, total_steps: int, settings: TrainingConfig) -> float:
    """Return the fraction of the peak learning rate that an update uses.

    The rate rises linearly to its peak at update `warmup_steps`. From there, or over the last `decay_fraction` of the
    remaining steps, it decays such that the update after the last one would have rate zero. Cosine: Loshchilov & Hutter
    2017, "SGDR". Warm-up, stable, decay: Hu et al. 2024, "MiniCPM", section 4.

    Args:
        step: The update, counted from 1.
        total_steps: Updates of the whole training.
        settings: `warmup_steps`, `schedule` and `decay_fraction`, which has no effect on `constant`.

    Returns:
        A number in (0, 1].
    """
    warmup_steps, decay_fraction = settings.warmup_steps, settings.decay_fraction
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (total_steps + 1 - warmup_steps) if step > warmup_steps else 0.0
    progress = max(0.0, progress - (1.0 - decay_fraction)) / decay_fraction
    match settings.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))


def unfinished_warmup(warmup_steps: int, total_steps: int) -> str | None:
    """Return a warning if the warm-up is longer than training."""
    if warmup_steps <= total_steps:
        return None
    return (
        f"training.warmup_steps={warmup_steps} exceeds the {total_steps:,} steps of training: the learning rate rises "
        f"to {total_steps / warmup_steps:.0%} of its peak and never decays"
    )


def num_steps(settings: TrainingConfig, epoch_steps: int) -> int:
    """Return the number of steps, unless patience ends training earlier."""
    return settings.max_steps or settings.max_epochs * epoch_steps


def num_evaluations(settings: TrainingConfig, epoch_steps: int) -> int:
    """Return the number of evaluations: after each epoch, every `eval_interval` steps, and at the last step."""
    total_steps = num_steps(settings, epoch_steps)
    intervals = {epoch_steps, settings.eval_interval or epoch_steps}
    before_the_last = total_steps - 1
    due = sum(before_the_last // interval for interval in intervals)
    both = before_the_last // math.lcm(*intervals) if len(intervals) > 1 else 0
    return due - both + 1


def earliest_stop(settings: TrainingConfig, epoch_steps: int) -> int | None:
    """Return the first step at which patience could end training; None if it cannot end it early.

    The first epoch sets the loss that the following epochs fail to beat.
    """
    if settings.patience is None:
        return None
    step = (settings.patience + 1) * epoch_steps
    return step if step < num_steps(settings, epoch_steps) else None


def spacing(step: int) -> int:
    """Return the distance between later snapshots after `step` steps."""
    distance = LAST_POWER
    while step > distance * MAX_LATER:
        distance *= 2
    return distance


def is_snapshot(step: int, reached: int) -> bool:
    """Return whether the snapshot of `step` is kept after `reached` steps."""
    if step <= LAST_POWER:
        return step & (step - 1) == 0
    return step % spacing(reached) == 0


def most_snapshots(total_steps: int) -> int:
    """Return the largest number of snapshots that exist at once: at the end, or when they were last full."""

    def kept(reached: int) -> int:
        powers = 1 + min(reached, LAST_POWER).bit_length()  # and step 0
        return powers + max(0, reached // spacing(reached) - LAST_POWER // spacing(reached))

    last_full = spacing(total_steps) // 2 * MAX_LATER
    return max(kept(total_steps), kept(min(total_steps, last_full)))
