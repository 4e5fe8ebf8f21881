"""Which files the rows of a dataset come from, and by which builder they are read."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lumiere.config.schema import DatasetConfig
from lumiere.data.checksums import file_sha256
from lumiere.data.data_files import ending, files_in, folder_files
from lumiere.errors import DataError, shortened
from lumiere.files import read_file

if TYPE_CHECKING:
    import datasets

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
