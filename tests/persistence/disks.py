"""Disks that are watched, that fail, or that want everything durable."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from lumiere.files import Disk


class WatchedDisk(Disk):
    """Calls `look` with the name of the operation before each one, and in the middle of writing and removing."""

    def __init__(self, look: Callable[[str], None]) -> None:
        self.look = look

    def make_folder(self, path: Path, exist_ok: bool = False) -> None:
        self.look("make_folder")
        super().make_folder(path, exist_ok)

    @contextmanager
    def new_file(self, path: Path) -> Iterator[BinaryIO]:
        self.look("new_file")
        with super().new_file(path) as file:
            yield file
            file.flush()
            data = path.read_bytes()
            file.truncate(len(data) // 2)
            self.look("half")
            file.seek(len(data) // 2)
            file.write(data[len(data) // 2 :])

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.look("write_tensors")
        path.write_bytes(b"half")
        self.look("half")
        super().write_tensors(path, tensors, metadata)

    def fsync(self, descriptor: int) -> None:
        self.look("fsync")
        super().fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        self.look("rename")
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self.look("remove")
        if path.is_dir():
            next((file for file in path.rglob("*") if file.is_file()), path / "none").unlink(missing_ok=True)
            self.look("half")
        super().remove(path)


class FailingDisk(WatchedDisk):
    """Fails in the n-th operation, or in none for 0. `count` is the number of operations."""

    def __init__(self, number: int, code: int = errno.ENOSPC) -> None:
        super().__init__(self._come_to)
        self.number, self.code, self.count = number, code, 0

    def _come_to(self, name: str) -> None:
        self.count += 1
        if self.count == self.number:
            raise OSError(self.code, os.strerror(self.code))


class StrictDisk(Disk):
    """Checks that contents are durable before a rename, and the new name after it. `renamed` are the new names."""

    def __init__(self) -> None:
        self.synced: list[int] = []
        self.renamed: list[str] = []

    def fsync(self, descriptor: int) -> None:
        super().fsync(descriptor)
        self.synced.append(os.fstat(descriptor).st_ino)

    def rename(self, old: Path, new: Path) -> None:
        contents = {path.relative_to(old.parent): path.stat().st_ino for path in (old, *old.rglob("*"))}
        assert [str(path) for path, inode in contents.items() if inode not in self.synced] == []
        before = len(self.synced)
        super().rename(old, new)
        assert self.synced[before:] == [new.parent.stat().st_ino]
        self.renamed.append(new.name)
