"""SHA-256 of files, recomputed only when a file may have changed, and of the files of an encoded corpus."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import cast

import platformdirs

from lumiere.files import DISK, open_file, parse_json, read_file

CHECKSUMS = "checksums.json"
MAX_RECORD_BYTES = 10_000
SETTLED_SECONDS = 2.0
"""A file that changed more recently than this may change again within one time stamp."""


def cache_dir() -> Path:
    """Return the folder of encoded corpora; `LUMIERE_CACHE_DIR` overrides it."""
    return Path(os.environ.get("LUMIERE_CACHE_DIR") or platformdirs.user_cache_dir("lumiere"))


def file_sha256(path: str | Path, fresh: bool = False) -> str:
    """Return the SHA-256 of a file's contents.

    A file is not read again if its size, inode and times are those of an earlier call. They include the inode's change
    time, which users cannot set.

    Args:
        fresh: Read the file in any case.

    Raises:
        OSError: The file cannot be read.
    """
    path = os.path.abspath(path)
    record_path = cache_dir() / "checksums" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        stamp = [status.st_size, status.st_ino, status.st_dev, status.st_mtime_ns, status.st_ctime_ns]
        if not fresh:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                record = parse_json(read_file(record_path, MAX_RECORD_BYTES))
                if record["stamp"] == stamp and isinstance(record["sha256"], str):
                    return record["sha256"]
        started = time.time()
        sha256 = hashlib.file_digest(cast("BufferedReader", file), "sha256").hexdigest()
    if started - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS:
        with contextlib.suppress(OSError):  # without a writable cache, the file is only read again
            record_path.parent.mkdir(parents=True, exist_ok=True)
            write_json(record_path, {"stamp": stamp, "sha256": sha256})
    return sha256


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Replace a small JSON file atomically; other processes may read or write it at the same time."""
    DISK.write(path, json.dumps(value).encode())


def checksums_of(folder: Path, fresh: bool = False) -> dict[str, str]:
    """Return the SHA-256 of the ids and offsets in the folder of an encoded corpus, by file name.

    Args:
        fresh: Read every file, even if its size and times are those of an earlier call.

    Raises:
        OSError: A file cannot be read.
    """
    paths = sorted([*folder.glob("*.ids"), *folder.glob("*.offsets")])
    return {path.name: file_sha256(path, fresh) for path in paths}


def write_checksums(folder: Path) -> None:
    """Write the checksums of an encoded corpus into its folder."""
    write_json(folder / CHECKSUMS, checksums_of(folder))


def changed_files(folder: Path, fresh: bool = False) -> list[str]:
    """Return the names of the ids and offsets that changed since they were written.

    Folders of older versions have no checksums; they get those of their current files.

    Raises:
        OSError, ValueError: The files or the checksums cannot be read.
    """
    found = checksums_of(folder, fresh)
    try:
        written = parse_json(read_file(folder / CHECKSUMS, MAX_RECORD_BYTES))
    except FileNotFoundError:
        with contextlib.suppress(OSError):  # the cache may be read-only
            write_json(folder / CHECKSUMS, found)
        return []
    if not isinstance(written, dict):
        raise ValueError(f"{CHECKSUMS} is no mapping of files")
    return [name for name, sha256 in found.items() if written.get(name) != sha256]
