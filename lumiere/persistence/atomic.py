"""Files that are either the old one or the whole new one, whenever the power goes."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lumiere.errors import LumiereError

UNSUPPORTED = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS}
"""Errors of fsync on a directory by file systems that do not support it (some network and FUSE file systems)."""


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` so that no reader and no crash ever sees a part of it.

    Raises:
        OSError: as writing does; up to the moment of the replacement the old file is untouched.
    """
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces the one at `path` when the block ends without an error.

    Raises:
        OSError: as `write_atomically`.
    """
    import secrets

    path = Path(path)
    # Beside the target, because a replacement is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable, where the file system supports it; Windows needs no request."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def unwritable(path: str | Path, error: OSError) -> LumiereError:
    """Return the error to raise when a file of a run cannot be written."""
    return LumiereError(
        f"{str(path)!r} cannot be written: {error.strerror or error}",
        "make room or check the folder; lumiere train --resume RUN goes on from what was saved before",
    )


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise `unwritable(path)` for every OSError of the block."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error
