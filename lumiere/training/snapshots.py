"""At which steps the weights are kept, to look later at how the model came about.

Powers of two up to 512 (Biderman et al. 2023, "Pythia"), then evenly, with at most 64 later ones: when these are
full, the spacing doubles and every other one goes.
"""

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
