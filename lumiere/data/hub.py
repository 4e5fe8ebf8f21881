"""Datasets that the `datasets` library resolves or reads: from the Hub, folders with a README, Parquet and Arrow files.

Only its builders for plain data are used. Others may run code that they read: `pandas` unpickles.
"""

import logging
import os
import socket
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import datasets.config
import huggingface_hub
import huggingface_hub.constants
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HFValidationError

from lumiere.config.schema import DatasetConfig
from lumiere.data.sources import BUILDERS, Source, checked_sha256, has_subsets, local, plain_folder
from lumiere.data.tables import no_column
from lumiere.errors import DataError, nearest, shortened
from lumiere.files import is_writable

TEXT = "text"
PREPARED = "cache"
"""Builder of the Arrow files that `datasets` prepared before, which it falls back to offline."""
NO_NETWORK_SECONDS = 2.0
"""Timeout for connecting to the Hub."""


@dataclass(frozen=True)
class Rows:
    """One column of one split, read again at each iteration and never held in memory."""

    dataset: datasets.Dataset | datasets.IterableDataset
    column: str

    def __iter__(self) -> Iterator[str]:
        outer, *inner = path_of(self.column, self.dataset)
        batches = iter(self.dataset.select_columns(outer).iter(batch_size=1000))
        while batch := next_of(batches):
            for row in batch[outer]:
                for key in inner:
                    row = None if row is None else row[key]
                yield "" if row is None else row


def dataset_rows(config: DatasetConfig, source: Source) -> tuple[dict[str, Iterable[str]], str]:
    """Return the rows of each split, and the identity of their source.

    Raises:
        DataError: It cannot be read, or lacks the text column.
    """
    with errors_in_our_words(config):
        loaded = opened(config, source)
    for dataset in loaded.values():
        check_column(config, columns_of(dataset))
    prepared = {split: dataset for split, dataset in loaded.items() if isinstance(dataset, datasets.Dataset)}
    if source.hub is None or not prepared:
        identity = source.identity()
    else:
        identity = " ".join(f"{split} {dataset._fingerprint}" for split, dataset in prepared.items())
    return {str(split): Rows(dataset, config.text_column) for split, dataset in loaded.items()}, identity


def opened(
    config: DatasetConfig, source: Source
) -> Mapping[Any, datasets.Dataset] | Mapping[Any, datasets.IterableDataset]:
    """Open the splits of a source with `datasets`."""
    builder = source.hub
    if builder is None:
        # Identified by contents: the cache of `datasets` goes by names and times of files.
        files = {
            split: DataFilesList(paths, [(checked_sha256(path),) for path in paths])
            for split, paths in source.files.items()
        }
        builder = datasets.load_dataset_builder(source.builder, data_files=DataFilesDict(files))
    if config.streaming:
        loaded = builder.as_streaming_dataset()
        assert isinstance(loaded, datasets.IterableDatasetDict)
        return loaded
    builder.download_and_prepare()
    loaded = builder.as_dataset()
    assert isinstance(loaded, datasets.DatasetDict)
    return loaded


@contextmanager
def errors_in_our_words(config: DatasetConfig, offline: bool = False) -> Iterator[None]:
    """Turn exceptions of `datasets` into `DataError`; silence its progress bars and its log, which repeats them."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise data_error(config, error, offline) from None


def check_column(config: DatasetConfig, columns: Mapping[str, str]) -> None:
    """Raise a DataError unless the text column exists and holds text."""
    kind = columns.get(config.text_column)
    texts = [name for name, kind in columns.items() if kind == TEXT]
    if kind is None:
        raise no_column(config.name, config.text_column, list(columns), texts)
    if kind not in (TEXT, "null"):
        raise DataError(
            f"the column '{config.text_column}' of dataset '{config.name}' holds {kind}, not text",
            f"columns with text: {', '.join(texts)}" if texts else "choose a dataset with a column of text",
        )


def next_of(iterator: Iterator[Any]) -> Any:
    """Return the next row or batch of rows; None after the last.

    Raises:
        DataError: A stream broke off, with any exception of its source.
    """
    try:
        return next(iterator, None)
    except Exception as error:
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise DataError(
            f"the dataset cannot be read to its end: {reason}",
            "fix the file, or try again if it was the network: what was encoded so far is kept",
        ) from None


def columns_of(dataset: datasets.Dataset | datasets.IterableDataset) -> dict[str, str]:
    """Return the type of each column, nested columns by dotted name."""
    if dataset.features is not None:
        return flat_types(dataset.features)
    # Some builders know their columns only after the first row.
    row: dict[str, Any] = next_of(iter(dataset)) or {}
    return {name: TEXT if isinstance(value, str) else type(value).__name__ for name, value in row.items()}


def flat_types(features: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    types = {}
    for name, feature in features.items():
        if isinstance(feature, dict):
            types |= {prefix + name: "objects"} | flat_types(feature, f"{prefix}{name}.")
        else:
            dtype = getattr(feature, "dtype", None)
            text = dtype in ("string", "large_string") and isinstance(feature, datasets.Value)
            types[prefix + name] = TEXT if text else str(dtype or type(feature).__name__)
    return types


def path_of(column: str, dataset: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """Return the keys that lead to a column: several if it is nested."""
    if column in (dataset.column_names or [column]):
        return [column]
    outer, _, inner = column.partition(".")
    return [outer, *inner.split(".")]


def described_folder(config: DatasetConfig, folder: str) -> Source:
    """Return the source of a folder whose README assigns files to subsets and splits."""
    with errors_in_our_words(config):
        builder = resolved_builder(config, folder)
        files = {str(split): list(map(local, paths)) for split, paths in (builder.config.data_files or {}).items()}
        return Source(builder_name(config, builder), files, separator_of(config, builder))


def hub_source(config: DatasetConfig) -> Source:
    """Return the source of a dataset on the Hub, downloading the files that Lumiere reads itself."""
    offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE) or not hub_reachable()
    with errors_in_our_words(config, offline):
        if offline:
            # For this process. Both libraries have already read the environment.
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        try:
            builder = resolved_builder(config, config.name)
        except DataError:
            raise
        except Exception:
            # Files that Lumiere reads itself are downloaded, but never prepared by `datasets`.
            if not offline or not (folder := downloaded(config.name)):
                raise
            return described_folder(config, folder) if has_subsets(folder) else plain_folder(config, folder)
        name, separator = builder_name(config, builder), separator_of(config, builder)
        files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
        if name == "text" or (name in ("csv", "json") and not config.streaming):
            manager = datasets.DownloadManager(dataset_name=config.name, download_config=datasets.DownloadConfig())
            return Source(name, {split: manager.download(paths) for split, paths in files.items()}, separator)
        return Source(name, files, separator, builder)


def downloaded(name: str) -> str | None:
    """Return the folder of a dataset that was downloaded from the Hub, or None."""
    try:
        return huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
    except Exception:  # errors of several families
        return None


def resolved_builder(config: DatasetConfig, path: str) -> datasets.DatasetBuilder:
    """Return the builder that `datasets` resolves for a folder or a Hub name, before it reads any data."""
    files = config.data_files
    for entries in files.values() if isinstance(files, dict) else [files or []]:
        for entry in [entries] if isinstance(entries, str) else entries:
            local(entry)  # rejects URLs
    with warnings.catch_warnings(action="ignore"):  # deprecations of builders, which are rejected below anyway
        builder = datasets.load_dataset_builder(path, config.subset, data_files=files)
    builder_name(config, builder)
    return builder


def builder_name(config: DatasetConfig, builder: datasets.DatasetBuilder) -> str:
    """Return the name of a builder.

    Raises:
        DataError: It is not one of those that only read plain data, and might run code.
    """
    module = type(builder).__module__
    name = module.rpartition(".")[2]
    if name not in (*BUILDERS, PREPARED) or module != f"datasets.packaged_modules.{name}.{name}":
        raise DataError(
            f"dataset '{config.name}' needs the builder '{name}' of datasets, which might run code",
            f"convert it to one of these formats: {', '.join(BUILDERS)}",
        )
    return name


def separator_of(config: DatasetConfig, builder: datasets.DatasetBuilder) -> str | None:
    """Return the separator of CSV files, if the dataset sets one.

    Raises:
        DataError: The dataset sets other options of the builder, which Lumiere would ignore.
    """
    name = builder_name(config, builder)
    kept = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
    for option in fields(builder.config):
        value = getattr(builder.config, option.name)
        if option.name not in kept and value != option.default and name != PREPARED:
            raise DataError(
                f"dataset '{config.name}' sets the option '{option.name}' of the builder '{name}'",
                "Lumiere does not support it: convert the dataset to parquet",
            )
    separator = getattr(builder.config, "sep", ",")
    return None if separator == "," else separator


def data_error(config: DatasetConfig, error: Exception, offline: bool) -> DataError:
    """Describe an exception of `datasets`.

    Exception classes differ between its versions (`DatasetNotFoundError`, `FileNotFoundError`, `ConnectionError`,
    `ValueError` for a subset), so cases are distinguished by what was asked for, not by class alone.
    """
    # `DatasetGenerationError` has the reason as its cause.
    cause = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
    cache = str(datasets.config.HF_DATASETS_CACHE)
    if isinstance(cause, OSError) and not is_writable(cache):
        return DataError(
            f"the cache of datasets, {cache!r}, cannot be written: {cause.strerror or cause}",
            "set LUMIERE_CACHE_DIR or HF_HOME to a writable folder",
        )
    reason = " ".join(str(cause).split()) or type(cause).__name__
    if "BuilderConfig" in reason and config.subset is not None:
        available = reason.partition("Available:")[2].strip(" []").replace("'", "").split(", ")
        guess = nearest(config.subset, available) or available[0]
        return DataError(
            f"dataset '{config.name}' has no subset '{config.subset}', it has {', '.join(available)}",
            f"--set dataset.subset={guess}",
        )
    if "Config name is missing" in reason:
        subsets = reason.partition("among the available configs:")[2].partition("]")[0].strip(" [")
        return DataError(
            f"dataset '{config.name}' has several subsets: {subsets}", "choose one with --set dataset.subset=..."
        )
    if config.name in BUILDERS:
        return DataError(
            f"dataset.data_files={config.data_files} cannot be read as {config.name}: {shortened(reason)}",
            f"name {config.name} files that exist: --set dataset.data_files=...",
        )
    if offline:
        return DataError(
            f"dataset '{config.name}' is not on this machine, and the Hugging Face Hub cannot be reached",
            "use a local copy with --set dataset.name=path/to/copy, or lumiere train tiny, which needs no network",
        )
    if isinstance(error, FileNotFoundError | HFValidationError) and not os.path.exists(config.name):
        return DataError(
            f"dataset '{config.name}' exists neither as a local folder nor on the Hugging Face Hub",
            "check dataset.name; the built-in corpora are stories and chains",
        )
    return DataError(f"dataset '{config.name}' cannot be read: {shortened(reason)}", "check the dataset section")


def hub_reachable() -> bool:
    """Return whether the Hub accepts connections; True behind a proxy, where only a request could tell.

    `datasets` itself retries for half a minute, with a warning each time.
    """
    url = urlsplit(os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT)
    if url.scheme in getproxies() or url.hostname is None:
        return True
    address = (url.hostname, url.port or (443 if url.scheme == "https" else 80))
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=NO_NETWORK_SECONDS).close()
            connected.set()
        except OSError:
            pass

    # In a thread, because name resolution has no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NO_NETWORK_SECONDS)
    return connected.is_set()
