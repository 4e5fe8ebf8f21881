"""Read untrusted files, write files durably, and lock a run's folder.

Reads are bounded, open only regular files, and accept only strict JSON. A write leaves either the old file or the
complete new one, even after a power failure. Importing this module loads only the standard library.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lumiere.errors import LumiereError, RunBusyError

if TYPE_CHECKING:
    from torch import Tensor

MAX_DEPTH = 32  # of nested lists and mappings; ours have 5
MAX_INTEGER = 2**63 - 1


def open_file(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open the regular file at `path` for reading.

    Args:
        buffering: As in `open`.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device, which could block the reader forever.
    """
    file = open(path, "rb", buffering, opener=_open_at_once)  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def read_file(path: str | Path, limit: int) -> bytes:
    """Return the contents of a file of at most `limit` bytes.

    Raises:
        OSError: As `open_file`, or the file is larger.
    """
    with open_file(path) as file:
        # Python allocates the requested size at once. System files, whose size is 0, contain more than that.
        size = max(os.fstat(file.fileno()).st_size, 1 << 16)
        data = file.read(min(size, limit) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"More than {limit:,} bytes", str(path))
    return data


def parse_json(data: bytes | str) -> Any:
    """Return the value of a text in standard JSON (RFC 8259).

    Raises:
        ValueError: It is not UTF-8, not JSON, is nested more than `MAX_DEPTH` deep, or holds a duplicate key, NaN, an
            infinity, or an integer of more than 64 bits.
    """
    try:
        value = _DECODER.decode(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check(value)
    return value


def _open_at_once(path: str, flags: int) -> int:
    # Without this flag, which Windows lacks, opening a pipe blocks until another process writes to it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("duplicate key")
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
    """Return whether files can be created in a folder, or in its closest existing parent."""
    from tempfile import TemporaryFile

    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        # By trying, because permissions say nothing about a read-only file system, or for root.
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


UNSUPPORTED = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS}
"""Errors of fsync on a directory by file systems that do not support it (some network and FUSE file systems)."""


class Disk:
    """File operations that are durable when they return. Tests pass a disk that fails, or that is watched.

    All methods raise OSError.
    """

    def make_folder(self, path: Path, exist_ok: bool = False) -> None:
        path.mkdir(parents=True, exist_ok=exist_ok)

    def check_room(self, folder: Path, num_bytes: float) -> None:
        """Check that a file system has room before the first byte: a full disk affects other programs too."""
        if shutil.disk_usage(folder).free < num_bytes:
            raise OSError(errno.ENOSPC, f"it takes {num_bytes / 1e6:,.1f} MB, more than are free")

    def write(self, path: str | Path, data: bytes) -> None:
        """Write a file so that neither a reader nor a crash ever sees part of it. An existing file is replaced."""
        with self.replacing(path) as file:
            file.write(data)

    @contextmanager
    def replacing(self, path: str | Path) -> Iterator[BinaryIO]:
        """Open a new file that replaces the one at `path` when the block ends without an error."""
        import secrets

        path = Path(path)
        # Next to the target, because a replacement is atomic only within one file system.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with self.new_file(temporary) as file:
                yield file
            self.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @contextmanager
    def new_file(self, path: Path) -> Iterator[BinaryIO]:
        """Open a new file, whose contents are durable when the block ends."""
        with open(path, "xb") as file:
            yield file
            file.flush()
            self.fsync(file.fileno())

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a new safetensors file, without a copy of its tensors in memory."""
        import safetensors.torch

        try:
            safetensors.torch.save_file(dict(tensors), path, dict(metadata))
        except safetensors.SafetensorError as error:
            code = re.search(r"os error ([0-9]+)", str(error))
            raise OSError(
                int(code[1]) if code else errno.EIO, os.strerror(int(code[1])) if code else str(error)
            ) from error
        # Safetensors makes it readable by its owner alone; the folder's mode shows what the user's umask allows.
        path.chmod(path.parent.stat().st_mode & 0o666)
        self.sync(path)

    def link(self, old: Path, new: Path) -> None:
        """Give a file a second name, which outlives the first; copy it where that is not possible."""
        try:
            os.link(old, new, follow_symlinks=False)
        except FileNotFoundError:
            raise
        except (OSError, NotImplementedError):
            shutil.copyfile(old, new, follow_symlinks=False)

    def sync(self, path: Path) -> None:
        """Make a file's contents durable, or the names in a folder if the file system supports it."""
        is_folder = path.is_dir()
        if is_folder and os.name == "nt":  # Windows does so by itself
            return
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            self.fsync(descriptor)
        except OSError as error:
            if not is_folder or error.errno not in UNSUPPORTED:
                raise
        finally:
            os.close(descriptor)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or a folder. An existing file is replaced."""
        os.replace(old, new)
        self.sync(new.parent)

    def remove(self, path: Path) -> None:
        """Remove a file, a folder with its contents, or a link, but not what that points to."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


DISK = Disk()


RESUME_HINT = "make room or check the folder; lumiere train --resume RUN resumes from the last save"


@contextmanager
def writing(path: str | Path, hint: str = RESUME_HINT) -> Iterator[None]:
    """Context that turns every OSError into a LumiereError: the file of a run at `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise LumiereError(f"{str(path)!r} cannot be written: {error.strerror or error}", hint) from error


LOCK_NAME = ".lock"
PATIENCE = 2.0  # seconds; `is_locked` holds the lock for an instant


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the run in `folder`.

    Raises:
        RunBusyError: Another process holds it.
        LumiereError: The folder cannot be written to.
    """
    # Imported here and below: it takes half the time of `lumiere runs ls`, which needs it only for running runs.
    from filelock import FileLock, Timeout

    try:
        folder.stat()  # the lock would create a missing folder
        lock = FileLock(folder / LOCK_NAME)
        lock.acquire(timeout=PATIENCE, poll_interval=0.05)
    except Timeout:
        raise RunBusyError(
            f"{folder.name} is being trained by another process",
            f"lumiere runs show {folder.name} shows where; wait for it to end, or stop it",
        ) from None
    except OSError as error:
        raise LumiereError(
            f"{str(folder)!r} cannot be locked: {error.strerror or error}", "check the folder and its permissions"
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool | None:
    """Return whether a process on this machine holds the lock of the run in `folder`.

    None: unknown, because the lock file is missing or cannot be locked. Processes on other machines are not seen.
    """
    from filelock import FileLock, Timeout

    path = folder / LOCK_NAME
    if not path.is_file():  # a look must not create the file
        return None
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        return None
    lock.release()
    return False
