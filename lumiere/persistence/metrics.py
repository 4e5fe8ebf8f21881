"""`metrics.jsonl`: one JSON object a line, written as training goes and cut back when it resumes."""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lumiere.errors import LumiereError
from lumiere.files import open_file, parse_json
from lumiere.persistence.atomic import replacing, unwritable, writing

MAX_LINE_BYTES = 100_000
BLOCK_BYTES = 1 << 20  # written at once
MAX_NUMBER = 1e18  # no count or loss is larger; NaN and infinity are not below it either


class MetricsWriter:
    """Appends records to a metrics file; each line reaches the system before `write` returns.

    Raises:
        LumiereError: the file cannot be opened, or is a link, which could lead out of the run's folder.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            # Without a buffer, whose rest a failed write would leave to be written later.
            self._file = open(path, "ab", buffering=0, opener=_open_no_link)  # noqa: SIM115 (close() closes it)
        except OSError as error:
            raise unwritable(self._path, error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; NaN and infinity, which JSON does not have, become null.

        Raises:
            LumiereError: it cannot be written: the disk is full, perhaps.
            ValueError: `record` has no `step`, which every line of the file has.
        """
        if "step" not in record:
            raise ValueError(f"a metrics record needs a step, it has {', '.join(record) or 'nothing'}")
        line = (to_json(record) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise unwritable(self._path, error) from error
        # The system takes a part of what a disk has no more room for, and complains the next time.
        if written != len(line):
            raise unwritable(self._path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def close(self) -> None:
        with writing(self._path):  # a file server may report only now that there was no room
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file in the order of writing; none where there is no file yet.

    A last line that was torn by a crash is left out.

    Raises:
        LumiereError: a line before the last is damaged, or the file cannot be read.
    """
    return [record for _, record in _read_lines(Path(path))]


def truncate_metrics(path: str | Path, last_step: int) -> None:
    """Drops the lines after `last_step`, and a torn last line, so that a resumed run can append.

    Raises:
        LumiereError: as `read_metrics`; the file stays as it is.
    """
    path = Path(path)
    if not path.exists():
        return
    # In blocks: a long training writes gigabytes.
    block = bytearray()
    with writing(path), replacing(path) as file:
        for line, record in _read_lines(path):
            if record["step"] <= last_step:
                block += line + b"\n"
            if len(block) >= BLOCK_BYTES:
                file.write(block)
                block.clear()
        file.write(block)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None where the line is damaged or torn."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) else None


def as_number(value: Any) -> int | float | None:
    """`value` if it is a number that can be compared and shown; None for whatever else a file may hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and -MAX_NUMBER < value < MAX_NUMBER else None


def to_json(value: Any, indent: int | None = None, *, ensure_ascii: bool = False) -> str:
    """`value` as standard JSON text, with null for every NaN and infinity in it; nothing in it steers a terminal."""
    options: dict[str, Any] = {"indent": indent, "ensure_ascii": ensure_ascii, "allow_nan": False}
    try:
        text = json.dumps(value, **options)
    except (ValueError, TypeError):  # NaN, infinity, or a mapping that is not a dictionary
        text = json.dumps(_finite(value), **options)
    if text.replace("\n", "").isprintable():
        return text
    # Beyond those that JSON refuses, some characters steer a terminal, and no file can hold half of a surrogate pair.
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
    """Each whole line of the file as it stands, and the record in it."""
    damaged = None
    try:
        with open_file(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
                if damaged is not None:
                    raise LumiereError(
                        f"line {damaged} of {str(path)!r} is damaged",
                        "mend or delete that line; the checkpoints do not depend on this file",
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
    # As `open` does, but for the two flags, which Windows does not have: a pipe that nobody reads is an error too.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
