"""Whether the process that trains a run is alive, as seen from any machine that shares its folder.

A lock is seen by every process of the machine that holds it. Other machines may not see it (NFS without locks, Lustre
with `localflock`), so a training run also records its host and process, and touches a heartbeat file.
Importing this module loads neither torch nor pydantic.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lumiere.files import is_locked
from lumiere.persistence.record import RunRecord

HEARTBEAT_NAME = ".heartbeat"
WRITTEN_NAMES = (HEARTBEAT_NAME, "metrics.jsonl", "run.json")
"""Files that a training run writes; runs of older versions have no heartbeat."""
BEAT_SECONDS = 15.0
FRESH_SECONDS = 300.0
"""A run on another machine counts as running for this long after its last write. NFS may hide a write for a minute."""


def this_process() -> dict[str, Any]:
    """Return the fields of `run.json` that identify this process: `pid`, `host`, and the boot of the machine."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": _boot_id()}


def is_alive(folder: Path, record: RunRecord) -> bool:
    """Return whether a process trains the run in `folder`.

    Args:
        record: Its record.
    """
    is_held = is_locked(folder)
    if is_held or not _is_this_machine(record):
        return bool(is_held) or is_alive_elsewhere(folder, record)
    # The lock of a process of this machine would be seen, unless the file is gone or cannot be locked.
    return is_held is None and _exists(record.pid) and _age(folder, [HEARTBEAT_NAME]) < FRESH_SECONDS


def is_alive_elsewhere(folder: Path, record: RunRecord) -> bool:
    """Return whether the run was recorded on another machine, and wrote a file within the last `FRESH_SECONDS`."""
    if record.host is None or _is_this_machine(record):
        return False
    age = _age(folder, WRITTEN_NAMES)
    # The same host with another boot: this machine was restarted, or another machine has its name. Only the other
    # machine has written since this one started.
    was_restarted = record.host == socket.gethostname() and age > time.clock_gettime(time.CLOCK_BOOTTIME)
    return age < FRESH_SECONDS and not was_restarted


@contextmanager
def beating(folder: Path) -> Iterator[None]:
    """Touch the heartbeat file of the run in `folder` every `BEAT_SECONDS`, and remove it at the end.

    A failure is ignored: the other files of the run show life too.
    """
    path = folder / HEARTBEAT_NAME
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(path)

    try:
        os.close(os.open(path, flags, 0o666))
        os.utime(path)
    except OSError:
        yield
        return
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        with suppress(OSError):
            path.unlink()


def _is_this_machine(record: RunRecord) -> bool:
    """Return whether the record was written on this machine since its last start."""
    ours, theirs = _boot_id(), record.boot_id
    if ours is not None and theirs is not None:
        return ours == theirs  # containers of one machine have different host names, and see each other's locks
    return record.host == socket.gethostname()


def _boot_id() -> str | None:
    """Return the id of the running kernel; None outside Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _exists(pid: object) -> bool:
    """Return whether this machine has the process `pid`; True where that cannot be checked."""
    if os.name == "nt":  # os.kill would send Ctrl-C
        return True
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # a process of another user
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _age(folder: Path, names: Sequence[str]) -> float:
    """Return the seconds since one of the files was last written; infinite if there is none of them.

    Measured by the clock that stamps the files, which may be a file server's: clocks of machines differ. A time in the
    future has a negative age, and counts as fresh.
    """
    times = []
    for name in names:
        with suppress(OSError):
            times.append((folder / name).lstat().st_mtime)
    return _now(folder) - max(times) if times else float("inf")


def _now(folder: Path) -> float:
    """Return the current time by the clock that stamps files in `folder`."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # it cannot be written to
        return time.time()
