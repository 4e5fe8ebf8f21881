"""Disks that are watched, or that fail, for tests of saving."""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lumiere.persistence.disk import Disk


class WatchedDisk(Disk):
    """Calls `look` with the name of the operation before each one, and in the middle of writing and removing."""

    def __init__(self, look: Callable[[str], None]) -> None:
        self.look = look

    def make_folder(self, path: Path) -> None:
        self.look("make_folder")
        super().make_folder(path)

    def write(self, path: Path, data: bytes) -> None:
        self.look("write")
        super().write(path, data[: len(data) // 2])
        self.look("half")
        path.unlink()
        super().write(path, data)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.look("write_tensors")
        path.write_bytes(b"half")
        self.look("half")
        super().write_tensors(path, tensors, metadata)

    def sync(self, path: Path) -> None:
        self.look("sync")
        super().sync(path)

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
