"""Which files the rows of a dataset come from, and by which builder they are read."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.config.schema import DatasetConfig
from lumiere.data.checksums import file_sha256
from lumiere.errors import DataError, nearest, shortened
from lumiere.files import read_file

if TYPE_CHECKING:
    import datasets


SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "validate": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
"""The usual names of splits, and ours."""

METADATA_FILES = (
    "readme.md",
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
)

DataFiles = str | list[str] | dict[str, str | list[str]]


def resolve_data_files(data_files: DataFiles, endings: Collection[str] | None = None) -> dict[str, list[str]]:
    """Return the absolute paths of the files of each split, in the order given; a pattern's or a folder's sorted.

    An entry is a file, a folder, or a glob pattern (`**` descends into folders). A text that names none of them may be
    several entries with commas between. `~` is the home folder. Entries without a split are the training split; a
    single folder is divided as by `folder_files`.

    Args:
        endings: Of the files to take from folders, such as `.txt`. Default: all.

    Raises:
        DataError: An entry is not local or matches no file, or a split has an unknown name or two names.
    """
    match data_files:
        case dict():
            splits: dict[str, list[str]] = {}
            for name, entries in data_files.items():
                split = split_of(name)
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
                splits[split] = expand([entries] if isinstance(entries, str) else entries, endings)
            return splits
        case str() if os.path.isdir(local(data_files)):
            return folder_files(data_files, endings)
        case str():
            return {"train": expand([data_files], endings)}
        case _:
            return {"train": expand(data_files, endings)}


def absolute_data_files(data_files: DataFiles) -> DataFiles:
    """Return the same entries with absolute paths, so that they mean the same in another working directory."""
    match data_files:
        case dict():
            return {name: absolute_entries([own] if isinstance(own, str) else own) for name, own in data_files.items()}
        case str():
            entries = absolute_entries([data_files])
            return entries if entries[1:] else entries[0]
        case _:
            return absolute_entries(data_files)


def absolute_entries(entries: Iterable[str]) -> list[str]:
    """Return files, folders and patterns with absolute paths, and without commas between them."""
    found = []
    for entry in entries:
        if os.path.exists(local(entry)):
            found.append(local(entry))
        elif "," in entry and not matches(entry, None):
            found += absolute_entries(part.strip() for part in entry.split(",") if part.strip())
        else:
            found.append(absolute_pattern(entry))
    return found


def absolute_pattern(entry: str) -> str:
    """Return a pattern with an absolute path; brackets in the name of the working directory are no pattern."""
    return os.path.join(glob.escape(os.getcwd()), os.path.expanduser(entry))


def folder_files(folder: str, endings: Collection[str] | None = None) -> dict[str, list[str]]:
    """Return the files in a folder by split.

    The names of subfolders decide, then those of files: `valid/a.txt`, `news-test.txt`. Without any split's name, all
    files are training files.

    Raises:
        DataError: The folder has no such files, or only some of them belong to a split.
    """
    root = local(folder)
    paths = files_in(root, endings)
    if not paths:
        raise no_files(folder, endings)
    relative = [Path(os.path.relpath(path, root)) for path in paths]
    for names in ([path.parent.as_posix() for path in relative], [path.name for path in relative]):
        found = [split_within(name) for name in names]
        if not any(found):
            continue
        if None in found:
            odd = relative[found.index(None)]
            raise DataError(
                f"the file '{odd}' in folder '{shortened(folder)}' belongs to no split, but others do",
                "name its split (train, validation or test) in its file name, or list files in dataset.data_files",
            )
        return {
            split: [path for path, own in zip(paths, found, strict=True) if own == split]
            for split in SPLITS
            if split in found
        }
    return {"train": paths}


def split_of(name: str) -> str | None:
    """Return our name of a split (`val` is `validation`), or None if it is unknown."""
    return SPLIT_NAMES.get(name.strip().lower())


def split_within(name: str) -> str | None:
    """Return the split that a word of a file's or folder's name stands for, or None."""
    words = (SPLIT_NAMES.get(word) for word in re.split(r"[^a-z]+", name.lower()))
    return next(filter(None, words), None)


def local(path: str) -> str:
    """Return the absolute path.

    Raises:
        DataError: It is a URL, or a path that `fsspec` reads as a chain of file systems.
    """
    if "://" in path or "::" in path:
        raise DataError(
            f"dataset.data_files must be local files, not '{shortened(path)}'", "download it and name the copy"
        )
    return os.path.abspath(os.path.expanduser(path))


def expand(entries: Iterable[str], endings: Collection[str] | None) -> list[str]:
    """Return the files that the entries name, each once."""
    paths = []
    for entry in entries:
        found = matches(entry, endings)
        if not found and "," in entry:
            parts = [part.strip() for part in entry.split(",") if part.strip()]
            found = [path for part in parts for path in matches(part, endings) or missing(part, endings)]
        paths += found or missing(entry, endings)
    if not paths:
        raise DataError("dataset.data_files names no file", "name them: --set dataset.data_files=book.txt")
    return list(dict.fromkeys(paths))


def matches(entry: str, endings: Collection[str] | None) -> list[str]:
    """Return the files that one entry names. A name that exists is no pattern."""
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
    """Return the files below a folder, sorted, without hidden ones and those about a dataset."""
    found = glob.glob("**", root_dir=folder, recursive=True)
    return [
        path
        for path in sorted(os.path.join(folder, name) for name in found)
        if os.path.isfile(path)
        and os.path.basename(path).lower() not in METADATA_FILES
        and (endings is None or ending(path) in endings)
    ]


def ending(path: str) -> str:
    """Return the ending of a file's name in lower case, without that of its compression."""
    root, last = os.path.splitext(path.lower())
    return os.path.splitext(root)[1] if last in (".gz", ".bz2", ".xz", ".zst") else last


def missing(entry: str, endings: Collection[str] | None) -> list[str]:
    """Raise the error for an entry that names no file."""
    if os.path.isdir(local(entry)):
        raise no_files(entry, endings)
    problem = "no file matches" if glob.has_magic(entry) else "there is no file"
    raise DataError(
        f"dataset.data_files: {problem} '{shortened(entry)}'",
        f"relative paths start at {os.getcwd()}; check --set dataset.data_files=...",
    )


def no_files(folder: str, endings: Collection[str] | None) -> DataError:
    kinds = f" ending in {', '.join(endings)}" if endings else ""
    return DataError(f"the folder '{shortened(folder)}' has no files{kinds}", "check the path, or name the files")


ENDINGS: Mapping[str, tuple[str, ...]] = {
    "text": (".txt", ".md"),
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
"""The builders, and which files of a folder each reads."""
BUILDERS = tuple(ENDINGS)
MAX_README_BYTES = 10_000_000


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        builder: One of `BUILDERS`, or `cache`, which is a copy that `datasets` prepared before.
        files: The files of each split: absolute local paths, or addresses on the Hub.
        separator: Of CSV files, where it is known.
        hub: The builder of `datasets` that reads them. None: they are local.
    """

    builder: str
    files: Mapping[str, list[str]]
    separator: str | None = None
    hub: "datasets.DatasetBuilder | None" = None

    def identity(self) -> str:
        """Return what all rows depend on: a hash of local files, not of their names, so they may be moved.

        Of the Hub's files, the names and their commit.

        Raises:
            DataError: A file cannot be read.
        """
        if self.hub is not None:
            files: Any = self.hub.config.data_files or {}
            versions = [(str(split), list(paths), paths.origin_metadata) for split, paths in files.items()]
            return f"stream {self.hub.hash} {self.hub.config_id} {versions}"
        contents = {split: [checked_sha256(path) for path in paths] for split, paths in self.files.items()}
        return hashlib.sha256(json.dumps([self.builder, self.separator, contents], sort_keys=True).encode()).hexdigest()


def plain_folder(config: DatasetConfig, folder: str) -> Source:
    """Return the source of a folder of files of one kind, which their endings tell.

    Raises:
        DataError: The folder has several kinds of files, or none that Lumiere reads.
    """
    if config.subset is not None:
        raise DataError(f"dataset '{config.name}' has no subsets", "--set dataset.subset=null")
    endings = set(map(ending, files_in(folder, None)))
    builders = [name for name, own in ENDINGS.items() if endings & set(own)]
    if not builders:
        found = ", ".join(sorted(filter(None, endings))) or "none"
        known = ", ".join(one for own in ENDINGS.values() for one in own)
        raise DataError(
            f"dataset '{config.name}' has no files that Lumiere reads; endings found: {shortened(found)}",
            f"endings that it reads: {known}",
        )
    if len(builders) > 1:
        raise DataError(
            f"dataset '{config.name}' has files of several kinds: {', '.join(builders)}",
            f"choose one: --set dataset.name={builders[0]} --set dataset.data_files={config.name}",
        )
    files = folder_files(folder, ENDINGS[builders[0]])
    tabs = all(ending(path) == ".tsv" for paths in files.values() for path in paths)
    return Source(builders[0], files, "\t" if tabs else None)


def has_subsets(folder: str) -> bool:
    """Whether the README of a dataset folder says which files make which subset and split."""
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


def find_source(config: DatasetConfig) -> Source:
    """Return what the config names; nothing of the files is read but the README of a folder.

    Raises:
        DataError: It does not exist, cannot be reached, or is nothing that Lumiere reads.
    """
    if config.name in BUILDERS:
        if not config.data_files:
            raise DataError(
                f"dataset '{config.name}' needs files to read", "name them: --set dataset.data_files=book.txt"
            )
        return Source(config.name, resolve_data_files(config.data_files, ENDINGS[config.name]))
    path = os.path.expanduser(config.name)
    if os.path.isfile(path):
        builder = next((name for name, endings in ENDINGS.items() if ending(path) in endings), "text")
        raise DataError(
            f"dataset '{config.name}' is a file, not a folder",
            f"--set dataset.name={builder} --set dataset.data_files={config.name}",
        )
    if os.path.isdir(path) and not config.data_files and not has_subsets(path):
        return plain_folder(config, local(path))
    if not os.path.isdir(path) and (config.name.startswith((".", "~")) or os.path.isabs(path)):
        raise DataError(f"there is no dataset folder '{config.name}'", "check dataset.name")
    from lumiere.data.hub import described_folder, hub_source

    return described_folder(config, local(path)) if os.path.isdir(path) else hub_source(config)
