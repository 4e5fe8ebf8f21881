"""The rows of a dataset: from the built-in readers of plain text and tables, or through `datasets`."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from lumiere.config.schema import DatasetConfig
from lumiere.data.data_files import ending, local, resolve_data_files
from lumiere.data.source import BUILDERS, ENDINGS, Source, has_subsets, plain_folder
from lumiere.data.tables import csv_rows, json_rows
from lumiere.data.text import Part, blocks, lines, parts
from lumiere.errors import DataError


@dataclass(frozen=True)
class FileRows:
    """One column of CSV or JSON files, read again at each iteration."""

    source: Source
    split: str
    column: str

    def __iter__(self) -> Iterator[str]:
        paths = self.source.files[self.split]
        if self.source.builder == "csv":
            return csv_rows(paths, self.column, self.source.separator)
        return json_rows(paths, self.column)


@dataclass(frozen=True)
class TextFiles:
    """Plain text files. Iterating yields their lines; `parts` reads each file as a document."""

    paths: Sequence[str]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(map(lines, self.paths))

    def parts(self) -> Iterator[Part]:
        return chain.from_iterable(parts(blocks(path)) for path in self.paths)


def load_rows(config: DatasetConfig) -> tuple[dict[str, Iterable[str]], str]:
    """Return the rows of each split, and a fingerprint of where they come from.

    Raises:
        DataError: The dataset does not exist or cannot be reached, would be read by a builder that may run code, or
            lacks the subset or the text column.
    """
    source = find_source(config)
    if source.builder == "text":
        return {split: TextFiles(paths) for split, paths in source.files.items()}, source.identity()
    if source.builder not in ("csv", "json"):
        from lumiere.data.hub import dataset_rows

        return dataset_rows(config, source)
    rows: dict[str, Iterable[str]] = {split: FileRows(source, split, config.text_column) for split in source.files}
    for split in rows:
        next(iter(rows[split]), None)  # a missing column is said before anything is built
    return rows, source.identity()


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
