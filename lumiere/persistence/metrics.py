"""`metrics.jsonl`: one JSON object a line, written as training goes and cut back when it resumes."""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lumiere.errors import LumiereError
from lumiere.persistence.atomic import write_atomically


class MetricsWriter:
    """Appends records to a metrics file; each line reaches the system before `write` returns.

    Raises:
        LumiereError: the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            # Without a buffer, whose rest a failed write would leave to be written later.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (close() closes it)
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
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unwritable(path: Path, error: OSError) -> LumiereError:
    """What to raise where a line could not be written."""
    return LumiereError(
        f"{str(path)!r} cannot be written: {error.strerror or error}",
        "make room or check the folder; lumiere train --resume goes on from what was saved before",
    )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file in the order of writing; none where there is no file yet.

    A last line that was torn by a crash is left out.

    Raises:
        LumiereError: a line before the last is damaged.
    """
    return [record for _, record in _read_lines(Path(path))]


def truncate_metrics(path: str | Path, last_step: int) -> None:
    """Drops the lines after `last_step`, and a torn last line, so that a resumed run can append.

    Raises:
        LumiereError: a line before the last is damaged; the file stays as it is.
    """
    path = Path(path)
    kept = [line + b"\n" for line, record in _read_lines(path) if record["step"] <= last_step]
    if path.exists():
        try:
            write_atomically(path, b"".join(kept))
        except OSError as error:
            raise unwritable(path, error) from error


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as standard JSON text, with null for every NaN and infinity in it."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


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


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line of the file as it stands, and the record in it."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    if not lines[-1]:
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append((line, record))
        elif number < len(lines):
            raise LumiereError(
                f"line {number} of {str(path)!r} is damaged",
                "mend or delete that line; the checkpoints do not depend on this file",
            )
    return records
