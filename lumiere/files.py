"""Reading files that anybody may have written: never more than is wanted, never what is no file, never half-valid JSON.

Loads nothing but the standard library, because listing runs reads their records.
"""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_DEPTH = 32  # of nested lists and mappings; ours have 5
MAX_INTEGER = 2**63 - 1


def open_file(path: str | Path, buffering: int = -1) -> BinaryIO:
    """The regular file at `path`, to be read.

    Args:
        buffering: as for `open`.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device, on which a reader may wait for ever.
    """
    file = open(path, "rb", buffering, opener=_open_at_once)  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def read_file(path: str | Path, limit: int) -> bytes:
    """All of a file of at most `limit` bytes.

    Raises:
        OSError: as `open_file`, or the file is larger.
    """
    with open_file(path) as file:
        # Python allocates all that it is asked for. Files of the system give more than their size, which is 0.
        size = max(os.fstat(file.fileno()).st_size, 1 << 16)
        data = file.read(min(size, limit) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"More than {limit:,} bytes", str(path))
    return data


def parse_json(data: bytes | str) -> Any:
    """The value in a text of standard JSON (RFC 8259).

    Raises:
        ValueError: it is not UTF-8, not JSON, is nested more than `MAX_DEPTH` deep, or holds a key twice, NaN, an
            infinity, or an integer of more than 64 bits.
    """
    try:
        value = _DECODER.decode(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check(value)
    return value


def _open_at_once(path: str, flags: int) -> int:
    # Without this flag, which Windows does not have, opening a pipe waits for somebody to write into it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a key stands there twice")
    return mapping


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check(value: Any) -> None:
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            match item:
                case dict() | list() if depth == MAX_DEPTH:
                    raise ValueError("nested too deeply")
                case dict():
                    below += item.values()
                case list():
                    below += item
                case int() if abs(item) > MAX_INTEGER:
                    raise ValueError("an integer is out of range")
                case float() if not math.isfinite(item):  # 1e999
                    raise ValueError("a number is out of range")
        level, depth = below, depth + 1


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


def is_writable(folder: str) -> bool:
    """Whether files can be made in a folder, or in its nearest parent where it does not exist."""
    from tempfile import TemporaryFile

    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        # Tried out: permissions say nothing about a read-only file system, or for root.
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
