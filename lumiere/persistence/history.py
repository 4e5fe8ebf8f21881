"""The loss curves of runs, read back from `metrics.jsonl` to look at them.

Unlike `read_metrics`, which a resume relies on, these readers pass over what is damaged, and none holds the whole file.
Importing this module loads neither torch nor numpy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from lumiere.files import open_file
from lumiere.persistence.metrics import MAX_LINE_BYTES, as_number, parse_line

BLOCK_BYTES = 1024  # holds a whole training line, wherever it begins
MAX_POINTS = 1000  # of a curve; twice as many are still fewer than a picture has columns of pixels
# A training loss in the middle of whatever surrounds it: ten times as fast as to find the line and to parse it.
LOSS = re.compile(rb'"loss": ?(-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)(?=[,}])')

Item = TypeVar("Item")


class Point(NamedTuple):
    """A loss, and when it was measured: updates, targets trained on, seconds of training."""

    step: int
    tokens: int
    time: float
    loss: float


@dataclass(frozen=True)
class History:
    """The losses of a run in nats a token, in the order of the file."""

    training: tuple[Point, ...]
    validation: tuple[Point, ...]


def read_history(path: Path, max_points: int = MAX_POINTS) -> History:
    """The loss curves of a metrics file, each thinned out evenly to `max_points` to twice as many.

    The first and the last line of each are always kept, and no more than the kept lines are parsed or held.
    """
    training: Thinned[bytes] = Thinned(max_points)
    validation: Thinned[bytes] = Thinned(max_points)
    for line in _whole_lines(path):
        (validation if b'"val_loss"' in line else training).add(line)
    return History(
        tuple(_points(training.items(), "loss")),
        tuple(_points(validation.items(), "val_loss")),
    )


def point_of(record: dict[str, Any], key: str) -> Point | None:
    """The loss named `key` of a record; None where it has none, or where a number is not one."""
    step, tokens, time, loss = (as_number(record.get(name)) for name in ("step", "tokens", "time", key))
    if step is None or tokens is None or time is None or loss is None:
        return None
    return Point(int(step), int(tokens), float(time), float(loss))


def points_at(path: Path, tokens: int) -> tuple[Point | None, Point | None]:
    """The last training loss and the last validation loss at or before `tokens`; None where there is none."""
    found: dict[str, Point | None] = {"loss": None, "val_loss": None}
    for line in _whole_lines(path):
        record = parse_line(line) or {}
        for key in found:
            point = point_of(record, key)
            if point is not None and point.tokens <= tokens:
                found[key] = point
            elif point is not None:
                return found["loss"], found["val_loss"]
    return found["loss"], found["val_loss"]


def last_records(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last training line and the last evaluation line, found from the end; empty where there is none."""
    training: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    for line in _lines_from_the_end(path):
        if training and b'"val_loss"' not in line:
            continue  # to parse a million lines takes ten seconds
        record = parse_line(line) or {}
        if not training and "loss" in record:
            training = record
        if not evaluation and "val_loss" in record:
            evaluation = record
        if training and evaluation:
            break
    return training, evaluation


def sample_losses(path: Path, count: int) -> list[float]:
    """Training losses at `count` places spread evenly over a metrics file, the last one included.

    Reads `count` (two or more) kilobytes at most, however large the file is: a list of a thousand runs has to be there
    at once. A summary in `run.json` would be as fast, but stand still between two saves and be missing in older runs.
    """
    try:
        # Unbuffered, because a buffer would read more than the blocks that are asked for.
        with open_file(path, buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= count * BLOCK_BYTES:
                texts = LOSS.findall(file.read(size))
                places = sorted({round(i * (len(texts) - 1) / (count - 1)) for i in range(count)}) if texts else []
                texts = [texts[place] for place in places]
            else:
                texts = []
                for i in range(count):
                    file.seek(round(i * (size - BLOCK_BYTES) / (count - 1)))
                    found = LOSS.findall(file.read(BLOCK_BYTES))
                    texts += found[-1:] if i == count - 1 else found[:1]
    except OSError:
        return []
    return [loss for text in texts if (loss := as_number(float(text))) is not None]


class Thinned(Generic[Item]):
    """Keeps `size` to `2 * size` of the items that it is given, evenly spaced, however many there are.

    The first and the last are always among them.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._stride = 1
        self._kept: list[Item] = []
        self._count = 0
        self._last: Item | None = None

    def add(self, item: Item) -> None:
        self._last = None
        if self._count % self._stride:
            self._last = item
        else:
            self._kept.append(item)
            if len(self._kept) > 2 * self._size:
                self._kept = self._kept[::2]  # an odd number of them, so that the newest stays
                self._stride *= 2
        self._count += 1

    def items(self) -> list[Item]:
        return self._kept if self._last is None else [*self._kept, self._last]


def _points(lines: Iterable[bytes], key: str) -> Iterator[Point]:
    for line in lines:
        point = point_of(parse_line(line) or {}, key)
        if point is not None:
            yield point


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file up to one that is too long to be ours; a torn last one is left out.

    So a file with holes, which may be terabytes long and take no room on the disk, is not read to its end.
    """
    try:
        with open_file(path) as file:
            while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                yield line
    except OSError:
        return


def _lines_from_the_end(path: Path, block_bytes: int = 1 << 16) -> Iterator[bytes]:
    """The lines of a file, last one first, with what a torn last one has, down to one that is too long to be ours."""
    try:
        with open_file(path) as file:
            end = file.seek(0, os.SEEK_END)
            rest = b""
            while end and len(rest) <= MAX_LINE_BYTES:
                begin = max(0, end - block_bytes)
                file.seek(begin)
                rest, *lines = (file.read(end - begin) + rest).split(b"\n")
                yield from reversed(lines)
                end = begin
            if not end:
                yield rest
    except OSError:
        return
