"""Loss curves are read back from any file, however long or damaged, without reading more than is needed."""

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumiere.persistence import metrics as history
from lumiere.persistence.metrics import (
    SAMPLE_BYTES,
    Downsampler,
    Point,
    last_records,
    points_at,
    read_history,
    read_metrics,
    sample_losses,
)


def training(step: int, loss: Any = None, key: str = "loss") -> dict[str, Any]:
    position = {"step": step, "epoch": 0.1, "tokens": 100 * step, "time": step / 2}
    return position | {key: step / 8 if loss is None else loss}


def evaluation(step: int, loss: float) -> dict[str, Any]:
    return training(step, loss, "val_loss")


def write(path: Path, *records: Any, tail: bytes = b"") -> None:
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode() + tail)


def test_a_history_is_every_point_where_there_are_few(path: Path) -> None:
    write(path, training(1), training(2), evaluation(2, 3.5), training(3))
    found = read_history(path)
    assert found.training == (Point(1, 100, 0.5, 0.125), Point(2, 200, 1.0, 0.25), Point(3, 300, 1.5, 0.375))
    assert found.validation == (Point(2, 200, 1.0, 3.5),)


@given(st.integers(1, 20), st.integers(0, 300))
def test_thinning_is_even_and_keeps_both_ends(size: int, count: int) -> None:
    thinned: Downsampler[int] = Downsampler(size)
    for item in range(count):
        thinned.add(item)
    items = thinned.items()
    assert len(items) <= 2 * size + 1
    assert len(items) >= min(size, count)
    if count:
        assert (items[0], items[-1]) == (0, count - 1)
    gaps = {b - a for a, b in itertools.pairwise(items[:-1])}
    assert len(gaps) <= 1, "all but the last gap are equal"


def test_a_long_history_is_thinned_to_points_of_the_file(path: Path) -> None:
    write(path, *(training(step) for step in range(1, 5001)), evaluation(5000, 1.0))
    found = read_history(path, max_points=100)
    assert 100 <= len(found.training) <= 201
    assert (found.training[0].step, found.training[-1].step) == (1, 5000)
    assert all(point.loss == point.step / 8 for point in found.training)
    assert len(found.validation) == 1


DAMAGED = [b"\x00\xff\n", b"[1]\n", b'{"step": "1", "loss": 1}\n', b"[" * 5000 + b"\n", b'{"step": 4, "loss": 5']


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_damaged_is_passed_over(path: Path, damage: bytes) -> None:
    write(path, training(1), tail=damage)
    assert [point.step for point in read_history(path).training] == [1]
    assert points_at(path, 1000) == (Point(1, 100, 0.5, 0.125), None)
    assert last_records(path) == (training(1), {})


@pytest.mark.parametrize("loss", ["1", True, float("nan"), float("inf"), 10**400, [1], {}])
def test_what_is_no_number_is_no_point(path: Path, loss: Any) -> None:
    write(path, training(1), training(2, loss))
    assert [point.step for point in read_history(path).training] == [1]
    assert sample_losses(path, 8) == [0.125]


def test_there_may_be_no_file(path: Path) -> None:
    assert read_history(path).training == ()
    assert points_at(path, 5) == (None, None)
    assert last_records(path) == ({}, {})
    assert sample_losses(path, 8) == []


def test_points_at_are_the_last_ones_measured_by_then(path: Path) -> None:
    write(path, training(1), training(2), evaluation(2, 7.0), training(3), training(4), evaluation(4, 6.0))
    for tokens in (0, 99, 100, 200, 250, 399, 400, 10**6):
        records = [record for record in read_metrics(path) if record["tokens"] <= tokens]
        losses = [record["loss"] for record in records if "loss" in record]
        val_losses = [record["val_loss"] for record in records if "val_loss" in record]
        found_training, found_validation = points_at(path, tokens)
        assert (found_training.loss if found_training else None) == (losses[-1] if losses else None)
        assert (found_validation.loss if found_validation else None) == (val_losses[-1] if val_losses else None)


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1000, 10**6])
def test_a_file_is_read_from_its_end_in_blocks_of_any_size(path: Path, block_bytes: int) -> None:
    write(path, *(training(step) for step in range(20)), tail=b'{"torn')
    backwards = list(history._lines_from_the_end(path, block_bytes))
    assert backwards == path.read_bytes().split(b"\n")[::-1]


def test_the_last_records_are_found_wherever_they_are(path: Path) -> None:
    write(path, training(1), evaluation(1, 9.0), *(training(step) for step in range(2, 3000)))
    assert last_records(path) == (training(2999), evaluation(1, 9.0))


def test_few_losses_are_sampled_evenly(path: Path) -> None:
    write(path, *(training(step) for step in range(5)), evaluation(4, 99.0))
    assert sample_losses(path, 8) == [step / 8 for step in range(5)]
    write(path, *(training(step) for step in range(15)))
    assert sample_losses(path, 8) == [step / 8 for step in range(0, 15, 2)]


def test_many_losses_are_sampled_evenly_from_the_first_to_the_last(path: Path) -> None:
    records = []
    for step in range(1000):
        records += [training(step), evaluation(step, 99.0)] if step % 10 == 9 else [training(step)]
    write(path, *records)
    samples = [8 * loss for loss in sample_losses(path, 5)]
    assert (samples[0], samples[-1]) == (0, 999)
    assert samples == pytest.approx([0, 250, 500, 750, 999], abs=15)


def test_sampling_reads_a_bounded_part_of_any_file(path: Path) -> None:
    """A file of a terabyte, which takes no room: to read it whole would take hours."""
    write(path, *(training(1000 + step) for step in range(100)))
    with open(path, "r+b") as file:
        file.truncate(2**40)
        file.seek(2**40 - SAMPLE_BYTES)
        file.write((json.dumps(training(8)) + "\n").encode())
    assert sample_losses(path, 8) == [125.0, 1.0]


def test_a_file_with_holes_is_read_up_to_the_first(path: Path) -> None:
    write(path, training(1), evaluation(1, 9.0))
    with open(path, "r+b") as file:
        file.truncate(2**40)
        file.seek(2**40)
        file.write(b"\n" + json.dumps(training(8)).encode() + b"\n")
    found = read_history(path)
    assert ([point.step for point in found.training], [point.step for point in found.validation]) == ([1], [1])
    assert points_at(path, 1000) == (found.training[0], found.validation[0])
    assert last_records(path) == (training(8), {})


def test_looking_at_a_long_file_takes_little_memory(path: Path) -> None:
    block = b"".join(json.dumps(training(step)).encode() + b"\n" for step in range(100))
    with open(path, "wb") as file:
        for _ in range(200):
            file.write(block)
    size = path.stat().st_size
    for look in (lambda: read_history(path, max_points=50), lambda: last_records(path), lambda: points_at(path, 700)):
        tracemalloc.start()
        look()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size / 4
