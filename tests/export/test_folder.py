"""A folder that is there whole or not at all."""

import os
from pathlib import Path

import pytest

from lumiere.errors import LumiereError
from lumiere.export.exporting import check_folder, new_folder, write_files

FILES = {"a.txt": b"one", "b.bin": bytes(range(256))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_new_or_an_empty_folder_is_filled(is_there: bool) -> None:
    if is_there:
        Path("out").mkdir()
    with new_folder(Path("out")) as staging:
        write_files(staging, FILES)
        assert not Path("out").exists() or not contents(Path("out")), "nothing is seen before it is whole"
    assert contents(Path("out")) == FILES
    assert os.listdir() == ["out"]


def fill_and_stop(path: Path) -> None:
    with new_folder(path) as staging:
        write_files(staging, FILES)
        raise KeyboardInterrupt


@pytest.mark.parametrize("is_there", [False, True])
def test_what_fails_leaves_nothing(is_there: bool) -> None:
    if is_there:
        Path("out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fill_and_stop(Path("out"))
    assert os.listdir() == ["out"] * is_there
    assert not is_there or not contents(Path("out"))


def test_what_came_in_meanwhile_is_kept() -> None:
    Path("out").mkdir()
    with pytest.raises(LumiereError, match="'out' cannot be written"), new_folder(Path("out")):
        Path("out/mine.txt").write_text("mine")
    assert contents(Path("out")) == {"mine.txt": b"mine"}
    assert os.listdir() == ["out"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("full", "the folder 'full' is not empty"),
        ("file", "'file' exists and is no folder"),
        ("link", "'link' exists and is no folder"),
        ("none/out", "there is no folder 'none'"),
        (".", "'.' is the current folder"),
        ("full/..", "is the current folder"),
    ],
)
def test_what_is_refused(path: str, message: str) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    before = sorted(os.listdir())
    with pytest.raises(LumiereError, match=message):
        check_folder(Path(path))
    with pytest.raises(LumiereError, match=message), new_folder(Path(path)):
        raise AssertionError("the block must not be entered")
    assert sorted(os.listdir()) == before
    assert contents(Path("full")) == {"mine.txt": b"mine"}
