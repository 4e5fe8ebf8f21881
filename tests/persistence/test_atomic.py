"""A file is the old one or the whole new one."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lumiere.files import write_atomically

KILLED_WHILE_WRITING = """
import os, sys
from lumiere.files import write_atomically
setattr(os, sys.argv[2], lambda *arguments: os._exit(9))
write_atomically(sys.argv[1], b"new")
"""


def fail(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_file_holds_exactly_the_bytes_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    for data in (b"first", b"", bytes(range(256)) * 100):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failure_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_failing_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text, which a binary file does not take")  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_an_interrupt_counts_as_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.bin", b"new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_killed_process_leaves_the_old_file_and_at_most_a_hidden_temporary(tmp_path: Path, function: str) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    result = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path), function], check=False)
    assert result.returncode == 9
    assert path.read_bytes() == b"old"
    others = {entry.name for entry in tmp_path.iterdir()} - {"file.bin"}
    assert all(name.startswith(".") and name.endswith(".tmp") for name in others)


def test_data_is_durable_before_its_name_and_the_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"new"
        assert source.parent == target.parent
        calls.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "file.bin", b"new")
    assert calls == ["sync file", "replace", "sync folder"]


def test_the_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
