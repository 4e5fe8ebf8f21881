"""Which files the rows of a dataset come from, and how they are read."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lumiere.config.schema import DatasetConfig
from lumiere.data.checksums import file_sha256
from lumiere.errors import DataError, nearest, shortened
from lumiere.files import read_file

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "validate", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Our split by its common names."""
METADATA_FILES = [
    "readme.md",
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
]
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "text": (".txt", ".md"),
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
"""File name endings of each format."""
BUILDERS = tuple(ENDINGS)
"""The formats that Lumiere reads, named after the builders of `datasets`."""
MAX_README_BYTES = 10_000_000

DataFiles = str | list[str] | dict[str, str | list[str]]


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        builder: One of `BUILDERS`.
        files: Files of each split: absolute local paths, or addresses on the Hub.
        separator: Separator of CSV files, if known.
        version: Identifies files on the Hub that are read without downloading them first. None: they are local.
    """

    builder: str
    files: Mapping[str, list[str]]
    separator: str | None = None
    version: str | None = None

    def identity(self) -> str:
        """Return what all rows depend on.

        For local files a hash of their contents, not of their names, so that they may be moved; for files of the Hub
        their names and commit.

        Raises:
            DataError: A file cannot be read.
        """
        if self.version is not None:
            return self.version
        contents = {split: [checked_sha256(path) for path in paths] for split, paths in self.files.items()}
        return hashlib.sha256(json.dumps([self.builder, self.separator, contents], sort_keys=True).encode()).hexdigest()


def plain_folder(config: DatasetConfig, folder: str) -> Source:
    """Return the source of a folder whose files have one format, recognized by their endings.

    Raises:
        DataError: The folder has files of several formats, or of none that Lumiere reads.
    """
    if config.subset is not None:
        raise DataError(f"dataset '{config.name}' has no subsets", "--set dataset.subset=null")
    endings = set(map(ending, files_in(folder, None)))
    builders = [name for name, own in ENDINGS.items() if endings & set(own)]
    if not builders:
        found = ", ".join(sorted(filter(None, endings))) or "none"
        known = ", ".join(one for own in ENDINGS.values() for one in own)
        problem = f"dataset '{config.name}' has no files that Lumiere reads, only endings: {shortened(found)}"
        raise DataError(problem, f"supported endings: {known}")
    if len(builders) > 1:
        raise DataError(
            f"dataset '{config.name}' has files of several formats: {', '.join(builders)}",
            f"choose one: --set dataset.name={builders[0]} --set dataset.data_files={config.name}",
        )
    files = folder_files(folder, ENDINGS[builders[0]])
    tabs = all(ending(path) == ".tsv" for paths in files.values() for path in paths)
    return Source(builders[0], files, "\t" if tabs else None)


def has_subsets(folder: str) -> bool:
    """Return whether the README of a dataset folder assigns files to subsets and splits."""
    for name in ("README.md", ".huggingface.yaml"):
        try:
            text = read_file(os.path.join(folder, name), MAX_README_BYTES).decode(errors="replace")
        except OSError:
            continue
        if re.search(r"^configs:", text, re.MULTILINE):
            return True
    return False


def checked_sha256(path: str) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path!r} cannot be read: {error.strerror}", "check dataset.data_files") from None


# dataset.data_files


def resolve_data_files(data_files: DataFiles, endings: Collection[str] | None = None) -> dict[str, list[str]]:
    """Return the absolute paths of the files of each split: in the given order, sorted within a pattern or folder.

    An entry is a file, a folder, or a glob pattern (`**` descends into folders). Text that names none of them may be
    several entries separated by commas. `~` is the home folder. Entries without a split belong to the training split; a
    single folder is split by `folder_files`.

    Args:
        endings: Endings of the files to take from folders, such as `.txt`. Default: all.

    Raises:
        DataError: An entry is not local or matches no file, or a split has an unknown name or two names.
    """
    if isinstance(data_files, str) and os.path.isdir(local(data_files)):
        return folder_files(data_files, endings)
    if not isinstance(data_files, dict):
        return {"train": expand(data_files, endings)}
    splits: dict[str, list[str]] = {}
    for name, entries in data_files.items():
        split = SPLIT_NAMES.get(name.strip().lower())
        if split is None:
            guess = nearest(name.lower(), SPLIT_NAMES)
            raise DataError(
                f"dataset.data_files has an unknown split '{shortened(name, 60)}'",
                f"did you mean {SPLIT_NAMES[guess]}?" if guess else f"splits are {', '.join(SPLITS)}",
            )
        if split in splits:
            raise DataError(
                f"dataset.data_files names the {split} split twice",
                f"'{name}' means {split}: list all its files under one name",
            )
        splits[split] = expand(entries, endings)
    return splits


def absolute_data_files(data_files: DataFiles) -> DataFiles:
    """Return the same entries with absolute paths, valid in any working directory."""
    if isinstance(data_files, dict):
        return {name: absolute_entries(own) for name, own in data_files.items()}
    entries = absolute_entries(data_files)
    return entries[0] if isinstance(data_files, str) and len(entries) == 1 else entries


def entries_of(given: str | list[str]) -> list[str]:
    """Return each entry on its own: text that names no file may be several entries separated by commas."""
    entries = []
    for entry in [given] if isinstance(given, str) else given:
        is_one = "," not in entry or os.path.exists(local(entry)) or matches(entry, None)
        entries += [entry] if is_one else [part.strip() for part in entry.split(",") if part.strip()]
    return entries


def absolute_entries(given: str | list[str]) -> list[str]:
    """Return files, folders and patterns with absolute paths."""
    return [local(entry) if os.path.exists(local(entry)) else absolute_pattern(entry) for entry in entries_of(given)]


def absolute_pattern(entry: str) -> str:
    """Return a pattern with an absolute path, in which brackets of the working directory's name are literal."""
    return os.path.join(glob.escape(os.getcwd()), os.path.expanduser(entry))


def folder_files(folder: str, endings: Collection[str] | None = None) -> dict[str, list[str]]:
    """Return the files in a folder by split.

    Names of subfolders decide, then those of files: `valid/a.txt`, `news-test.txt`. If none names a split, all files
    are training files.

    Raises:
        DataError: The folder has no such files, or only some of them belong to a split.
    """
    root = local(folder)
    paths = files_in(root, endings)
    if not paths:
        raise no_match(folder, endings)
    relative = [Path(os.path.relpath(path, root)) for path in paths]
    for names in ([path.parent.as_posix() for path in relative], [path.name for path in relative]):
        found = [split_within(name) for name in names]
        if None in found and any(found):
            odd = relative[found.index(None)]
            raise DataError(
                f"the file '{odd}' in folder '{shortened(folder)}' belongs to no split, but others do",
                "put train, validation or test into its name, or list the files in dataset.data_files",
            )
        if any(found):
            files = {split: [path for path, own in zip(paths, found, strict=True) if own == split] for split in SPLITS}
            return {split: own for split, own in files.items() if own}
    return {"train": paths}


def split_within(name: str) -> str | None:
    """Return the split that a word in the name of a file or folder stands for, or None."""
    words = (SPLIT_NAMES.get(word) for word in re.split(r"[^a-z]+", name.lower()))
    return next(filter(None, words), None)


def local(path: str) -> str:
    """Return the absolute path.

    Raises:
        DataError: It is a URL, or a path that `fsspec` reads as a chain of file systems.
    """
    if "://" in path or "::" in path:
        raise DataError(
            f"dataset.data_files must be local files, got '{shortened(path)}'", "download it and name the copy"
        )
    return os.path.abspath(os.path.expanduser(path))


def expand(given: str | list[str], endings: Collection[str] | None) -> list[str]:
    """Return the files that the entries name, each once."""
    paths: list[str] = []
    for entry in entries_of(given):
        found = matches(entry, endings)
        if not found:
            raise no_match(entry, endings)
        paths += found
    if not paths:
        raise DataError("dataset.data_files names no file", "--set dataset.data_files=book.txt")
    return list(dict.fromkeys(paths))


def matches(entry: str, endings: Collection[str] | None) -> list[str]:
    """Return the files that one entry names. The name of an existing file is never read as a pattern."""
    path = local(entry)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return files_in(path, endings)
    if "\0" in path or not glob.has_magic(entry):
        return []
    found = map(os.path.abspath, glob.glob(absolute_pattern(entry), recursive=True))
    return sorted(filter(os.path.isfile, found))


def files_in(folder: str, endings: Collection[str] | None) -> list[str]:
    """Return the files below a folder, sorted, without hidden files and metadata of datasets."""
    found = glob.glob("**", root_dir=folder, recursive=True)
    return [
        path
        for path in sorted(os.path.join(folder, name) for name in found)
        if os.path.isfile(path)
        and os.path.basename(path).lower() not in METADATA_FILES
        and (endings is None or ending(path) in endings)
    ]


def ending(path: str) -> str:
    """Return the ending of a file name in lower case, ignoring that of a compression."""
    root, last = os.path.splitext(path.lower())
    return os.path.splitext(root)[1] if last in (".gz", ".bz2", ".xz", ".zst") else last


def no_match(entry: str, endings: Collection[str] | None) -> DataError:
    """Return the error for an entry that names no file."""
    if os.path.isdir(local(entry)):
        kinds = f" ending in {', '.join(endings)}" if endings else ""
        return DataError(f"the folder '{shortened(entry)}' has no files{kinds}", "check the path, or name the files")
    problem = "no file matches" if glob.has_magic(entry) else "there is no file"
    return DataError(
        f"dataset.data_files: {problem} '{shortened(entry)}'", f"relative paths start at {os.getcwd()}; check the path"
    )
