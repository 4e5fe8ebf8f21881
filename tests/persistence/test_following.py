"""A follower gives each line once, whatever a training and its resume do to the file."""

import json
from pathlib import Path

import pytest

from lumiere.persistence.metrics import MetricsFollower, MetricsWriter, truncate_metrics


def append(path: Path, *steps: int, tail: str = "") -> None:
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 1.0})
        writer._file.write(tail.encode())


def poll(follower: MetricsFollower) -> list[int]:
    return [record["step"] for record in follower.poll()]


def test_each_line_comes_once(path: Path) -> None:
    follower = MetricsFollower(path)
    assert poll(follower) == []
    append(path, 1, 2)
    assert poll(follower) == [1, 2]
    assert poll(follower) == []
    append(path, 3)
    assert poll(follower) == [3]
    assert follower.restarts == 0


def test_a_torn_line_waits_for_its_end(path: Path) -> None:
    follower = MetricsFollower(path)
    append(path, 1, tail='{"step": 2, ')
    assert poll(follower) == [1]
    assert poll(follower) == []
    with open(path, "a") as file:
        file.write('"loss": 1}\n')
    assert poll(follower) == [2]


def test_a_damaged_line_is_passed_over(path: Path) -> None:
    follower = MetricsFollower(path)
    append(path, 1, tail="\x00\n[]\n")
    append(path, 2)
    assert poll(follower) == [1, 2]
    append(path, 3)
    assert poll(follower) == [3]


@pytest.mark.parametrize("steps_after", [[], [3], [3, 4, 5, 6, 7, 8]])
def test_a_file_that_was_cut_back_begins_anew(path: Path, steps_after: list[int]) -> None:
    """Also where training has written past the old end before the follower looks again."""
    follower = MetricsFollower(path)
    append(path, 1, 2, 30, 40)
    assert poll(follower) == [1, 2, 30, 40]
    truncate_metrics(path, 2)
    append(path, *steps_after)
    assert poll(follower) == [1, 2, *steps_after]
    assert follower.restarts == 1
    assert poll(follower) == []


def test_nothing_is_read_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(path, *range(1000))
    follower = MetricsFollower(path)
    assert len(poll(follower)) == 1000
    append(path, 1000)
    parsed = []

    def parse(line: bytes) -> dict[str, int]:
        parsed.append(line)
        return json.loads(line)

    monkeypatch.setattr("lumiere.persistence.metrics.parse_line", parse)
    assert poll(follower) == [1000]
    assert len(parsed) == 1
