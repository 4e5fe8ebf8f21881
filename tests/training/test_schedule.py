"""The learning rate's schedules against values computed by hand, and their invariants on every small training."""

import math
from itertools import pairwise
from typing import Literal

import pytest

from lumiere.config.schema import TrainingConfig
from lumiere.training.schedule import learning_rate_factor

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant")


def factors(total_steps: int, warmup_steps: int, schedule: Schedule, decay_fraction: float = 1.0) -> list[float]:
    """The factor of each update of a training."""
    settings = TrainingConfig(warmup_steps=warmup_steps, schedule=schedule, decay_fraction=decay_fraction)
    return [learning_rate_factor(step, total_steps, settings) for step in range(1, total_steps + 1)]


def cosine(*degrees: float) -> list[float]:
    return [0.5 + 0.5 * math.cos(math.radians(degree)) for degree in degrees]


# 15 updates, 4 of them warm-up: the decay from update 4 to the one after the last takes 12 steps of 15 degrees. With
# half of the ten from 2 to 12, the decay takes five steps.
WARMUP = [0.25, 0.5, 0.75, 1.0]
PLATEAU = [0.5, *[1.0] * 6]


@pytest.mark.parametrize(
    ("total_steps", "warmup_steps", "schedule", "decay_fraction", "expected"),
    [
        (15, 4, "cosine", 1.0, [*WARMUP, *cosine(*range(15, 180, 15))]),
        (15, 4, "linear", 1.0, [*WARMUP, *(step / 12 for step in range(11, 0, -1))]),
        (15, 4, "constant", 1.0, [*WARMUP, *[1.0] * 11]),
        *((5, 500, schedule, 1.0, [0.002, 0.004, 0.006, 0.008, 0.01]) for schedule in SCHEDULES),
        *((4, 4, schedule, 1.0, WARMUP) for schedule in SCHEDULES),
        (4, 0, "linear", 1.0, [0.8, 0.6, 0.4, 0.2]),
        (3, 0, "cosine", 1.0, [0.8535533905932737, 0.5, 0.1464466094067263]),
        (3, 0, "constant", 1.0, [1.0, 1.0, 1.0]),
        (11, 2, "linear", 0.5, [*PLATEAU, 0.8, 0.6, 0.4, 0.2]),
        (11, 2, "cosine", 0.5, [*PLATEAU, *cosine(36, 72, 108, 144)]),
        (11, 2, "constant", 0.5, [0.5, *[1.0] * 10]),
    ],
)
def test_values_by_hand(
    total_steps: int, warmup_steps: int, schedule: Schedule, decay_fraction: float, expected: list[float]
) -> None:
    assert factors(total_steps, warmup_steps, schedule, decay_fraction) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_small_training_rises_to_its_peak_and_then_only_falls(schedule: Schedule) -> None:
    for total_steps in range(1, 40):
        for warmup_steps in range(45):
            values = factors(total_steps, warmup_steps, schedule)
            rise, fall = values[:warmup_steps], values[warmup_steps:]
            assert all(0 < value <= 1 for value in values)
            assert rise == sorted(rise)
            assert fall == sorted(fall, reverse=True)
            if len(rise) == warmup_steps > 0:
                assert rise[-1] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_jumps_and_the_last_one_still_moves(schedule: Schedule) -> None:
    values = factors(2000, 400, schedule)
    steepest = 1.0001 * max(1 / 400, math.pi / 2 / 1601)
    assert all(abs(after - before) <= steepest for before, after in pairwise(values))
    assert values[-1] <= steepest or schedule == "constant"
    settings = TrainingConfig(warmup_steps=500, schedule=schedule)
    assert learning_rate_factor(1_000_000, 1_000_000, settings) > 0
