"""Datasets that `datasets` resolves or reads: the Hub's, folders with a README, Parquet and Arrow files.

Of its builders only those of plain data are used: others run what they read (`pandas` unpickles).
"""

import logging
import os
import socket
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
"""What `datasets` calls its own copy, in Arrow files, of what it prepared before; it takes it where the Hub is away."""
NO_NETWORK_SECONDS = 2.0
"""How long to wait for the Hub's host before it counts as out of reach."""


@dataclass(frozen=True)
class Rows:
    """One column of one split, read again at each iteration and never whole in memory."""

    dataset: datasets.Dataset | datasets.IterableDataset
    column: str

    def __iter__(self) -> Iterator[str]:
        outer, *inner = path_of(self.column, self.dataset)
        batches = iter(self.dataset.select_columns(outer).iter(batch_size=1000))
        while (batch := next_of(batches)) is not None:
            for row in batch[outer]:
                for key in inner:
                    row = None if row is None else row[key]
                yield "" if row is None else row


def dataset_rows(config: DatasetConfig, source: Source) -> tuple[dict[str, Iterable[str]], str]:
    """Return the rows of each split of what `datasets` reads, and a fingerprint of where they come from.

    Raises:
        DataError: It cannot be read, or lacks the text column.
    """
    quiet()
    try:
        loaded = opened(config, source)
    except DataError:
        raise
    except Exception as error:
        raise data_error(config, error, offline=False) from None
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
    """Return the splits of a source that `datasets` reads."""
    builder = source.hub
    if builder is None:
        # By their contents: its own cache goes by the names and the times of files.
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


def quiet() -> None:
    """Show neither progress nor errors of `datasets`: it logs them before it raises them."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)


def check_column(config: DatasetConfig, columns: Mapping[str, str]) -> None:
    """Raise a DataError unless the text column is there and holds text."""
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
    """The next row, or batch of rows; None after the last.

    Raises:
        DataError: a stream may break off, by whatever error its source raises.
    """
    try:
        return next(iterator, None)
    except Exception as error:
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise DataError(
            f"the dataset cannot be read to its end: {reason}",
            "mend the file, or try again where it was the network: what was encoded so far is kept",
        ) from None


def columns_of(dataset: datasets.Dataset | datasets.IterableDataset) -> dict[str, str]:
    """Return the type of each column, nested ones by their dotted names."""
    if dataset.features is not None:
        return flat_types(dataset.features)
    # Some builders do not know before the first row is read.
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
    """Return the keys that lead to a column: one, or several of a nested column."""
    if column in (dataset.column_names or [column]):
        return [column]
    outer, _, inner = column.partition(".")
    return [outer, *inner.split(".")]


def described_folder(config: DatasetConfig, folder: str) -> Source:
    """Return the source of a folder whose README says which files make which subset and split."""
    quiet()
    try:
        builder = resolved_builder(config, folder)
        files = {str(split): list(map(local, paths)) for split, paths in (builder.config.data_files or {}).items()}
        return Source(builder_name(config, builder), files, separator_of(config, builder))
    except DataError:
        raise
    except Exception as error:
        raise data_error(config, error, offline=False) from None


def hub_source(config: DatasetConfig) -> Source:
    """Return the source of a dataset on the Hub; files that Lumiere reads itself are downloaded."""
    quiet()
    offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE) or not hub_reachable()
    try:
        if offline:
            go_offline()
        try:
            builder = resolved_builder(config, config.name)
        except DataError:
            raise
        except Exception:
            # Files that were downloaded, but that `datasets` did not prepare since Lumiere reads them itself.
            if not offline or not (folder := downloaded(config.name)):
                raise
            return described_folder(config, folder) if has_subsets(folder) else plain_folder(config, folder)
        name, separator = builder_name(config, builder), separator_of(config, builder)
        files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
        if name == "text" or (name in ("csv", "json") and not config.streaming):
            manager = datasets.DownloadManager(dataset_name=config.name, download_config=datasets.DownloadConfig())
            return Source(name, {split: manager.download(paths) for split, paths in files.items()}, separator)
        return Source(name, files, separator, builder)
    except DataError:
        raise
    except Exception as error:
        raise data_error(config, error, offline) from None


def downloaded(name: str) -> str | None:
    """Return the folder of what the Hub's library has downloaded of a dataset, if there is any."""
    try:
        return huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
    except Exception:  # it raises errors of several families
        return None


def resolved_builder(config: DatasetConfig, path: str) -> datasets.DatasetBuilder:
    """Return the builder that `datasets` chooses for a folder or a Hub name, before it has read any data."""
    files = config.data_files
    for pattern in [files] if isinstance(files, str) else files.values() if isinstance(files, dict) else files or []:
        for one in [pattern] if isinstance(pattern, str) else pattern:
            local(one)  # refuses URLs
    with warnings.catch_warnings(action="ignore"):  # that a builder, which is then refused, is deprecated
        builder = datasets.load_dataset_builder(path, config.subset, data_files=files)
    builder_name(config, builder)
    return builder


def builder_name(config: DatasetConfig, builder: datasets.DatasetBuilder) -> str:
    """Return the name of a builder.

    Raises:
        DataError: It is none of those that only read plain data, and might run code.
    """
    module = type(builder).__module__
    name = module.rpartition(".")[2]
    if name not in (*BUILDERS, PREPARED) or module != f"datasets.packaged_modules.{name}.{name}":
        raise DataError(
            f"dataset '{config.name}' needs the builder '{name}' of datasets, which Lumiere does not run",
            f"convert it to one of these: {', '.join(BUILDERS)}",
        )
    return name


def separator_of(config: DatasetConfig, builder: datasets.DatasetBuilder) -> str | None:
    """Return the separator of CSV files, if the dataset names one.

    Raises:
        DataError: The dataset asks `datasets` for another way of reading, which would be left out.
    """
    name = builder_name(config, builder)
    kept = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
    for option in fields(builder.config):
        value = getattr(builder.config, option.name)
        if option.name not in kept and value != option.default and name != PREPARED:
            raise DataError(
                f"dataset '{config.name}' sets the option '{option.name}' of the builder '{name}'",
                "Lumiere does not read it so: convert the dataset to parquet",
            )
    separator = getattr(builder.config, "sep", ",")
    return None if separator == "," else separator


def data_error(config: DatasetConfig, error: Exception, offline: bool) -> DataError:
    """What went wrong in `datasets`, in our words.

    Raised classes differ between its versions (`DatasetNotFoundError`, `FileNotFoundError`, `ConnectionError`,
    `ValueError` for a subset), so the cases are told apart by what was asked for, not by class alone.
    """
    # The class that says what was going on when a file could not be read names the reason as its cause.
    told = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
    cache = str(datasets.config.HF_DATASETS_CACHE)
    if isinstance(told, OSError) and not is_writable(cache):
        return DataError(
            f"the cache of datasets, {cache!r}, cannot be written: {told.strerror or told}",
            "set LUMIERE_CACHE_DIR, or HF_HOME, to a folder that can be written to",
        )
    reason = " ".join(str(told).split()) or type(told).__name__
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
            f"dataset '{config.name}' has several subsets: {subsets}",
            "choose one with --set dataset.subset=...",
        )
    if config.name in BUILDERS:
        return DataError(
            f"dataset.data_files={config.data_files} cannot be read as {config.name}: {shortened(reason)}",
            f"name files that exist and hold {config.name}: --set dataset.data_files=...",
        )
    if offline:
        return DataError(
            f"dataset '{config.name}' is not on this machine, and the Hugging Face Hub cannot be reached",
            "use a local copy with --set dataset.name=path/to/copy, or train configs/tiny.yaml, which needs no network",
        )
    if isinstance(error, FileNotFoundError | HFValidationError) and not os.path.exists(config.name):
        return DataError(
            f"there is no dataset '{config.name}', neither as a local folder nor on the Hugging Face Hub",
            "check dataset.name; the built-in corpus is called stories",
        )
    return DataError(f"dataset '{config.name}' cannot be read: {shortened(reason)}", "check the section dataset")


def hub_reachable() -> bool:
    """Whether the Hub's host takes connections. Behind a proxy only a request could tell, so that counts as yes.

    `datasets` retries for half a minute, with a warning each time, before it admits that there is no network.
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

    # In a thread, because a look-up of the name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NO_NETWORK_SECONDS)
    return connected.is_set()


def go_offline() -> None:
    """Let this process read the local cache only. Both libraries have read the environment already."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
