"""A lock on a run's folder, held by the process that trains it and gone with that process, however it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumiere.errors import LumiereError, RunBusyError

LOCK_NAME = ".lock"
PATIENCE = 2.0  # seconds; a look by `is_locked` holds the lock for an instant


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside of it, no other process holds the lock of the run in `folder`.

    Raises:
        RunBusyError: another process holds it.
        LumiereError: the folder cannot be written to.
    """
    # Here and below: half of the time of `lumiere runs ls`, which needs it only where a run says that it is running.
    from filelock import FileLock, Timeout

    try:
        folder.stat()  # the lock would make a folder where there is none
        lock = FileLock(folder / LOCK_NAME)
        lock.acquire(timeout=PATIENCE, poll_interval=0.05)
    except Timeout:
        raise RunBusyError(
            f"{folder.name} is being trained by another process",
            f"lumiere runs show {folder.name} says where; wait for its end, or stop it",
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
    """Return whether a process of this machine holds the lock of the run in `folder`.

    None stands for unknown: there is no lock file, or it cannot be locked. A process of another machine may hold the
    lock without being seen.
    """
    from filelock import FileLock, Timeout

    path = folder / LOCK_NAME
    if not path.is_file():  # and a look leaves no file behind
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
