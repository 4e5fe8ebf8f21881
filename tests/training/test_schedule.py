"""The learning rate's schedules against values computed by hand, and their laws on every small training."""

import math
from itertools import pairwise
from typing import Literal

import pytest

from lumiere.config.schema import TrainingConfig
from lumiere.training.schedule import learning_rate_factor

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant")

# 15 updates, 4 of them warm-up: the fall from update 4 to the one after the last takes 12 steps of 15 degrees.
WARMUP = [0.25, 0.5, 0.75, 1.0]
BY_HAND: dict[Schedule, list[float]] = {
    "cosine": [
        *WARMUP,
        0.9829629131445341,
        0.9330127018922193,
        0.8535533905932737,
        0.75,
        0.6294095225512604,
        0.5,
        0.3705904774487396,
        0.25,
        0.1464466094067263,
        0.0669872981077807,
        0.0170370868554659,
    ],
    "linear": [*WARMUP, 11 / 12, 10 / 12, 9 / 12, 8 / 12, 7 / 12, 6 / 12, 5 / 12, 4 / 12, 3 / 12, 2 / 12, 1 / 12],
    "constant": [*WARMUP, *[1.0] * 11],
}


def factors(total_steps: int, warmup_steps: int, schedule: Schedule) -> list[float]:
    """The factor of each update of a training."""
    settings = TrainingConfig(warmup_steps=warmup_steps, schedule=schedule)
    return [learning_rate_factor(step, total_steps, settings) for step in range(1, total_steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values_by_hand(schedule: Schedule) -> None:
    assert factors(15, 4, schedule) == pytest.approx(BY_HAND[schedule], abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warmup_longer_than_the_training_never_reaches_the_peak(schedule: Schedule) -> None:
    assert factors(5, 500, schedule) == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])


def test_without_warmup_the_first_update_is_the_first_of_the_fall() -> None:
    assert factors(4, 0, "linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert factors(3, 0, "cosine") == pytest.approx([0.8535533905932737, 0.5, 0.1464466094067263])
    assert factors(3, 0, "constant") == [1.0, 1.0, 1.0]


def test_a_warmup_as_long_as_the_training_ends_at_the_peak() -> None:
    for schedule in SCHEDULES:
        assert factors(4, 4, schedule) == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_laws_of_every_small_training(schedule: Schedule) -> None:
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
def test_there_is_no_jump_at_the_peak_nor_at_the_end(schedule: Schedule) -> None:
    values = factors(2000, 400, schedule)
    steepest = 1.0001 * max(1 / 400, math.pi / 2 / 1601)
    assert all(abs(after - before) <= steepest for before, after in pairwise(values))
    assert values[-1] <= steepest or schedule == "constant"


def test_the_last_update_of_a_long_training_still_moves() -> None:
    settings = TrainingConfig(warmup_steps=500, schedule="cosine")
    assert learning_rate_factor(1_000_000, 1_000_000, settings) > 0


def test_a_share_of_the_way_is_spent_at_the_peak() -> None:
    def values(schedule: Schedule, decay_fraction: float) -> list[float]:
        settings = TrainingConfig(warmup_steps=2, schedule=schedule, decay_fraction=decay_fraction)
        return [learning_rate_factor(step, 11, settings) for step in range(1, 12)]

    # The update after the last one, 12, would have rate 0; a half of the ten from 2 to 12 is the way down.
    assert values("linear", 0.5) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    falling = [0.5 + 0.5 * math.cos(math.pi * share) for share in (0.2, 0.4, 0.6, 0.8)]
    assert values("cosine", 0.5) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, *falling])
    assert values("linear", 1.0) == factors(11, 2, "linear")
    assert values("constant", 0.5) == factors(11, 2, "constant")
