"""Makes one system call that writes fail, the n-th of those that are made."""

import builtins
import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lumiere import files as atomic

CALLS = ("open", "mkdir", "fsync", "replace", "rename", "link")


class Failing:
    """Counts the calls that create, write, sync and rename files, and makes one of them fail with an OSError.

    Args:
        number: which call fails, counted from 1; 0 for none.
        code: its error number.
        only: counts no others of `CALLS` and "write" than these.
    """

    def __init__(self, number: int, code: int = errno.ENOSPC, only: Sequence[str] = (*CALLS, "write")) -> None:
        self._number = number
        self._code = code
        self._only = only
        self.count = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            patch.setattr(os, name, self._around(getattr(os, name), name))
        patch.setattr(atomic, "open", self._open, raising=False)

    def _come_to(self, name: str) -> None:
        if name not in self._only:
            return
        self.count += 1
        if self.count == self._number:
            raise OSError(self._code, os.strerror(self._code))

    def _around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if arguments[0] != os.devnull:
                self._come_to(name)
            return function(*arguments, **options)

        return call

    def _open(self, *arguments: Any, **options: Any) -> Any:
        if arguments[1] == "rb":
            return builtins.open(*arguments, **options)
        self._come_to("open")
        return FailingFile(builtins.open(*arguments, **options), lambda: self._come_to("write"))


class FailingFile:
    """A file whose writes may fail, with a part of the data written."""

    def __init__(self, file: Any, come_to_write: Callable[[], None]) -> None:
        self._file = file
        self._come_to_write = come_to_write

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._come_to_write()
        self._file.write(data[len(data) // 2 :])
