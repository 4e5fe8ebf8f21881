"""A file is the old one or the whole new one."""

import errno
import os
import stat
from pathlib import Path

import pytest

from lumiere.files import DISK, Disk
from tests.persistence.disks import FailingDisk, StrictDisk, WatchedDisk


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    return path


def test_the_file_holds_exactly_the_bytes_and_nothing_is_left_beside_it(path: Path) -> None:
    for data in (b"first", b"", bytes(range(256)) * 100):
        DISK.write(path, data)
        assert path.read_bytes() == data
    assert names(path.parent) == ["file.bin"]


def test_a_failure_anywhere_leaves_a_whole_file_and_no_temporary(path: Path) -> None:
    # Creating, half of the data, its fsync and the rename; only the fsync of the folder follows the replacement.
    for number, content in enumerate([b"old", b"old", b"old", b"old", b"new"], start=1):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            FailingDisk(number).write(path, b"new")
        assert (path.read_bytes(), names(path.parent)) == (content, ["file.bin"])
    counting = FailingDisk(0)
    counting.write(path, b"new")
    assert counting.count == 5


@pytest.mark.parametrize("error", [TypeError, KeyboardInterrupt])
def test_any_error_and_an_interrupt_count_as_a_failure(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), DISK.replacing(path) as file:  # noqa: PT012 (it raises inside)
        file.write(b"new")
        raise error
    assert (path.read_bytes(), names(path.parent)) == (b"old", ["file.bin"])


def test_a_kill_leaves_a_whole_file_and_at_most_a_hidden_temporary(path: Path) -> None:
    states: list[tuple[bytes, set[str]]] = []
    disk = WatchedDisk(lambda operation: states.append((path.read_bytes(), {*names(path.parent)} - {"file.bin"})))
    disk.write(path, b"new")
    assert [content for content, _ in states] == [b"old"] * 4 + [b"new"]
    assert [len(others) for _, others in states] == [0, 1, 1, 1, 0]
    assert all(name.startswith(".") and name.endswith(".tmp") for _, others in states for name in others)


def test_data_is_durable_before_its_name_and_the_name_after(path: Path) -> None:
    disk = StrictDisk()
    disk.write(path, b"new")
    assert disk.renamed == ["file.bin"]
    with open(path) as file:
        descriptor = file.fileno()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):  # the system is asked
        DISK.fsync(descriptor)


@pytest.mark.parametrize(("code", "is_fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_need_not_sync_folders(path: Path, code: int, is_fatal: bool) -> None:
    class FilesOnly(Disk):
        def fsync(self, descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, os.strerror(code))

    if is_fatal:
        with pytest.raises(OSError, match=os.strerror(code)):
            FilesOnly().write(path, b"new")
    else:
        FilesOnly().write(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_that_cannot_be_synced_is_not_written(path: Path) -> None:
    class NoSync(Disk):
        def fsync(self, descriptor: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        NoSync().write(path, b"new")
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        NoSync().sync(path)
    assert path.read_bytes() == b"old"


def test_the_file_gets_the_permissions_of_any_new_file(path: Path) -> None:
    DISK.write(path.with_name("ours"), b"")
    assert path.with_name("ours").stat().st_mode == path.stat().st_mode
