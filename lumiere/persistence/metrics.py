"""`metrics.jsonl`: append records while training, truncate on resume, read records, curves or a live tail.

One JSON object per line. `read_metrics`, which a resume relies on, refuses damage; the readers of curves skip it, and
none of them holds the whole file. Importing this module loads neither torch nor numpy.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

from lumiere.errors import LumiereError
from lumiere.files import DISK, Disk, open_file, parse_json, writing

MAX_LINE_BYTES = 100_000
BLOCK_BYTES = 1 << 20  # written at once
MAX_NUMBER = 1e18  # no count or loss is larger; NaN and infinity are not below it either


class MetricsWriter:
    """Append records to a metrics file; each line reaches the system before `write` returns.

    Raises:
        LumiereError: The file cannot be opened, or is a link, which could lead out of the run's folder.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        with writing(path):
            # Unbuffered: after a failed write, the rest of a buffer would be written later.
            self._file = open(path, "ab", buffering=0, opener=_open_no_link)  # noqa: SIM115 (close() closes it)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. NaN and infinity, which JSON does not have, become null.

        Raises:
            LumiereError: It cannot be written, for example because the disk is full.
            ValueError: `record` has no `step`.
        """
        if "step" not in record:
            raise ValueError(f"a metrics record needs a step, it has {', '.join(record) or 'nothing'}")
        line = (to_json(record) + "\n").encode()
        with writing(self._path):
            # A full disk takes a part of the line; only the next write would fail.
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        with writing(self._path):  # a file server may report a full disk only now
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file in order; empty if it does not exist.

    A last line that a crash cut short is left out.

    Raises:
        LumiereError: A line before the last is damaged, or the file cannot be read.
    """
    return [record for _, record in _read_lines(Path(path))]


def truncate_metrics(path: str | Path, last_step: int, disk: Disk = DISK) -> None:
    """Remove the lines after `last_step`, and an incomplete last line, so that a resumed run can append.

    Raises:
        LumiereError: As `read_metrics`; the file is unchanged.
    """
    path = Path(path)
    if not path.exists():
        return
    # In blocks: the file of a long run has gigabytes.
    block = bytearray()
    with writing(path), disk.replacing(path) as file:
        for line, record in _read_lines(path):
            if record["step"] <= last_step:
                block += line + b"\n"
            if len(block) >= BLOCK_BYTES:
                file.write(block)
                block.clear()
        file.write(block)


def whole_bytes(path: Path) -> int:
    """Return the length of a metrics file without a last line that is being written.

    Raises:
        OSError: It cannot be read.
    """
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        begin = file.seek(max(0, size - MAX_LINE_BYTES))
        return begin + file.read(size - begin).rfind(b"\n") + 1


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line; None if the line is damaged or incomplete."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) else None


def as_number(value: Any) -> int | float | None:
    """Return `value` if it is a finite number of reasonable size; None for anything else that a file may hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and -MAX_NUMBER < value < MAX_NUMBER else None


def to_json(value: Any, indent: int | None = None, *, ensure_ascii: bool = False) -> str:
    """Return `value` as standard JSON, with null for NaN and infinity, and without control characters."""
    options: dict[str, Any] = {"indent": indent, "ensure_ascii": ensure_ascii, "allow_nan": False}
    try:
        text = json.dumps(value, **options)
    except (ValueError, TypeError):  # NaN, infinity, or a mapping that is not a dictionary
        text = json.dumps(_finite(value), **options)
    if text.replace("\n", "").isprintable():
        return text
    # JSON allows some characters that control a terminal, and half surrogate pairs, which no file can hold.
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each complete line of the file, with its record."""
    damaged = None
    try:
        with open_file(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
                if damaged is not None:
                    raise LumiereError(
                        f"line {damaged} of {str(path)!r} is damaged",
                        "repair or delete that line; the checkpoints do not depend on this file",
                    )
                record = parse_line(line)
                if record is None:
                    damaged = number
                else:
                    yield line.removesuffix(b"\n"), record
    except FileNotFoundError:
        return
    except OSError as error:
        raise LumiereError(
            f"{str(path)!r} cannot be read: {error.strerror}", "move it away: nothing needs it"
        ) from None


def _open_no_link(path: str, flags: int) -> int:
    # As `open`, with two flags that Windows lacks: a link, and a pipe that nobody reads, are errors.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


SAMPLE_BYTES = 1024  # contains a complete training line, wherever it begins
MAX_POINTS = 1000  # of a curve; twice that is still fewer than the columns of a picture
# A training loss within any text: ten times as fast as finding and parsing its line.
LOSS = re.compile(rb'"loss": ?(-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)(?=[,}])')

Item = TypeVar("Item")


class Point(NamedTuple):
    """A loss in nats, with the updates, the targets trained on, and the seconds of training until then."""

    step: int
    tokens: int
    time: float
    loss: float


@dataclass(frozen=True)
class History:
    """The losses of a run, in nats per token, in the order of the file."""

    training: tuple[Point, ...]
    validation: tuple[Point, ...]


def read_history(path: Path, max_points: int = MAX_POINTS) -> History:
    """Return the loss curves of a metrics file, each downsampled evenly to between `max_points` and twice that.

    The first and the last line of each are always kept; only kept lines are parsed or held.
    """
    training: Downsampler[bytes] = Downsampler(max_points)
    validation: Downsampler[bytes] = Downsampler(max_points)
    for line in _whole_lines(path):
        (validation if b'"val_loss"' in line else training).add(line)
    return History(
        tuple(_points(training.items(), "loss")),
        tuple(_points(validation.items(), "val_loss")),
    )


def point_of(record: dict[str, Any], key: str) -> Point | None:
    """Return the loss `key` of a record; None if it or a number of its position is missing or invalid."""
    step, tokens, time, loss = (as_number(record.get(name)) for name in ("step", "tokens", "time", key))
    if step is None or tokens is None or time is None or loss is None:
        return None
    return Point(int(step), int(tokens), float(time), float(loss))


def points_at(path: Path, tokens: int) -> tuple[Point | None, Point | None]:
    """Return the last training loss and the last validation loss at or before `tokens`; None if there is none."""
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
    """Return the last training record and the last evaluation record, searched from the end; empty if none."""
    training: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    for line in _lines_from_the_end(path):
        if training and b'"val_loss"' not in line:
            continue  # parsing a million lines takes ten seconds
        record = parse_line(line) or {}
        if not training and "loss" in record:
            training = record
        if not evaluation and "val_loss" in record:
            evaluation = record
        if training and evaluation:
            break
    return training, evaluation


def sample_losses(path: Path, count: int) -> list[float]:
    """Return training losses at `count` places spread evenly over a metrics file, the last one included.

    Reads at most `count` (two or more) kilobytes, so that a thousand runs are listed at once. A summary in `run.json`
    would be as fast, but older runs lack it, and it changes only with a save.
    """
    try:
        # Unbuffered: a buffer would read more than the requested blocks.
        with open_file(path, buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= count * SAMPLE_BYTES:
                texts = LOSS.findall(file.read(size))
                places = sorted({round(i * (len(texts) - 1) / (count - 1)) for i in range(count)}) if texts else []
                texts = [texts[place] for place in places]
            else:
                texts = []
                for i in range(count):
                    file.seek(round(i * (size - SAMPLE_BYTES) / (count - 1)))
                    found = LOSS.findall(file.read(SAMPLE_BYTES))
                    texts += found[-1:] if i == count - 1 else found[:1]
    except OSError:
        return []
    return [loss for text in texts if (loss := as_number(float(text))) is not None]


class Downsampler(Generic[Item]):
    """Keep between `size` and `2 * size` evenly spaced items of any number that is added.

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
                self._kept = self._kept[::2]  # an odd number, so that the newest stays
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
    """Yield the complete lines of a file, up to one that is too long to be ours.

    A sparse file of terabytes is therefore not read to its end.
    """
    try:
        with open_file(path) as file:
            while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                yield line
    except OSError:
        return


def _lines_from_the_end(path: Path, block_bytes: int = 1 << 16) -> Iterator[bytes]:
    """Yield the lines of a file from the last one, which may be incomplete, to one that is too long to be ours."""
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


class MetricsFollower:
    """Return each new line of a metrics file once, without reading the file again.

    Attributes:
        restarts: How often the file was truncated, as by a resume; `poll` then starts again from its first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._last_line = b""
        self.restarts = 0

    def poll(self) -> Iterator[dict[str, Any]]:
        """Yield the records written since the last call; none if the file does not exist.

        An incomplete last line waits for the next call; damaged lines are skipped.
        """
        try:
            with open_file(self._path) as file:
                # Compare the line before: a resume may have truncated the file, and training may have written past
                # this place since.
                file.seek(self._offset - len(self._last_line))
                if file.read(len(self._last_line)) != self._last_line:
                    self._offset, self._last_line = 0, b""
                    self.restarts += 1
                    file.seek(0)
                while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                    self._offset += len(line)
                    self._last_line = line
                    record = parse_line(line)
                    if record is not None:
                        yield record
        except OSError:
            return
