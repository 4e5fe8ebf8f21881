"""Files of each split: names, lists, mappings, patterns and folders, and what is refused."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lumiere.data.sources import absolute_data_files, folder_files, resolve_data_files
from lumiere.errors import DataError


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with files, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "b.txt", "[1].txt", "1.txt", "x, y.txt", "books/2.txt", "books/1.txt", "books/more/3.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "books" / ".hidden.txt").touch()
    (tmp_path / "books" / "README.md").touch()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.txt", {"train": ["a.txt"]}),
        (["b.txt", "a.txt", "b.txt"], {"train": ["b.txt", "a.txt"]}),
        ({"train": "a.txt", "val": ["b.txt"]}, {"train": ["a.txt"], "validation": ["b.txt"]}),
        ("~/a.txt", {"train": ["a.txt"]}),
        ("[1].txt", {"train": ["[1].txt"]}),
        ("[ab].txt", {"train": ["a.txt", "b.txt"]}),
        ("x, y.txt", {"train": ["x, y.txt"]}),
        ("b.txt,a.txt", {"train": ["b.txt", "a.txt"]}),
        ("b.txt, [1].txt, ", {"train": ["b.txt", "[1].txt"]}),
        ("books/*.txt", {"train": ["books/1.txt", "books/2.txt"]}),
        ("books/**", {"train": ["books/1.txt", "books/2.txt", "books/README.md", "books/more/3.md"]}),
        ("books", {"train": ["books/1.txt", "books/2.txt", "books/more/3.md"]}),
        (["books/", "a.txt"], {"train": ["books/1.txt", "books/2.txt", "books/more/3.md", "a.txt"]}),
        ({"train": "books"}, {"train": ["books/1.txt", "books/2.txt", "books/more/3.md"]}),
        *(({"train": "a.txt", name: "b.txt"}, {"train": ["a.txt"], "validation": ["b.txt"]})
          for name in ("valid", "validation", "dev", "eval", "validate", "Valid", " VAL ")),
    ],
)  # fmt: skip
def test_files_by_split(files: Path, given: Any, expected: dict[str, list[str]]) -> None:
    absolute = {split: [str(files / name) for name in names] for split, names in expected.items()}
    assert resolve_data_files(given) == absolute


@pytest.mark.parametrize(
    ("given", "same_shape"),
    [
        ("a.txt", str), ("~/a.txt", str), ("[1].txt", str), ("[ab].txt", str), ("x, y.txt", str), ("b.txt,a.txt", list),
        ("books/*.txt", str), ("books", str), (["books", "~/a.txt", "../*/[1].txt"], list),
        ({"train": "b.txt, [1].txt", "val": "books"}, dict),
    ],
)  # fmt: skip
def test_absolute_entries_mean_the_same_elsewhere(
    files: Path, monkeypatch: pytest.MonkeyPatch, given: Any, same_shape: type
) -> None:
    inside = files / "w[12]k"
    inside.mkdir()
    for path in [*files.glob("*.txt"), files / "books"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, inside / path.name)
    monkeypatch.chdir(inside)
    before, absolute = resolve_data_files(given), absolute_data_files(given)
    monkeypatch.chdir(files / "empty")
    assert isinstance(absolute, same_shape)
    assert resolve_data_files(absolute) == before


def test_endings_choose_among_the_files_of_a_folder(files: Path) -> None:
    assert resolve_data_files(["books", "a.txt"], (".md",)) == {
        "train": [str(files / "books/more/3.md"), str(files / "a.txt")]
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.txt", "valid.txt"], {"train": ["train.txt"], "validation": ["valid.txt"]}),
        (["train/1.txt", "dev/test.txt"], {"train": ["train/1.txt"], "validation": ["dev/test.txt"]}),
        (["news-Train-1.txt", "news_eval2.txt", "test.txt"],
         {"train": ["news-Train-1.txt"], "validation": ["news_eval2.txt"], "test": ["test.txt"]}),
        (["latest.txt", "trainer.txt"], {"train": ["latest.txt", "trainer.txt"]}),
    ],
)  # fmt: skip
def test_a_folder_is_divided_by_names(tmp_path: Path, names: list[str], expected: dict[str, list[str]]) -> None:
    folder = tmp_path / "corpus"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    absolute = {split: [str(folder / name) for name in own] for split, own in expected.items()}
    assert folder_files("~/corpus") == absolute
    assert resolve_data_files("corpus") == absolute


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("no.txt", "no.txt"),
        ("pipe", "pipe"),  # never opened
        (["a.txt", "no.txt"], "no.txt"),
        ("a.txt,no.txt", "no.txt"),
        ("no*.txt", "no*.txt"),
        ("a\0b", "a\\x00b"),
        ("a\0*", "a\\x00*"),
        ("empty", "empty"),
        ({"train": []}, "no file"),
        ({"train": "empty"}, "empty"),
        ({"train": "a.txt", "vaildation": "b.txt"}, "vaildation"),
        ({"train": "a.txt", "other": "b.txt"}, "other"),
        ({"val": "a.txt", "dev": "b.txt"}, "validation"),
        ("https://host/a.txt", "https://host/a.txt"),
        ("hf://datasets/a/b.txt", "hf://datasets/a/b.txt"),
        (["a.txt", "s3://bucket/a.txt"], "s3://bucket/a.txt"),
        ("file:///etc/hostname", "file:///etc/hostname"),
        ("zip://a.txt::b.zip", "zip://a.txt::b.zip"),
    ],
)
def test_rejected_entries(given: Any, named: str) -> None:
    with pytest.raises(DataError) as caught:
        resolve_data_files(given)
    assert named in caught.value.message
    assert caught.value.hint
