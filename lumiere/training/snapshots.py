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
