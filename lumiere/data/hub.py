"""Rows of text through `datasets.load_dataset`: a Hub name, a local folder, or files through a builder."""

import logging
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import datasets.config
import huggingface_hub.constants
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HFValidationError

from lumiere.config.schema import DatasetConfig
from lumiere.errors import DataError, nearest
from lumiere.files import is_writable

BUILDERS = ("text", "json", "csv", "parquet")
NO_NETWORK_SECONDS = 2.0
"""How long to wait for the Hub's host before it counts as out of reach."""


@dataclass(frozen=True)
class Rows:
    """One column of one split, read anew at each iteration and never whole in memory."""

    dataset: datasets.Dataset | datasets.IterableDataset
    column: str

    def __iter__(self) -> Iterator[str]:
        batches = iter(self.dataset.select_columns(self.column).iter(batch_size=1000))
        while (batch := next_of(batches)) is not None:
            for row in batch[self.column]:
                yield "" if row is None else row


def load_rows(config: DatasetConfig) -> tuple[dict[str, Iterable[str]], str]:
    """The rows of each split, and a fingerprint of where they come from.

    Raises:
        DataError: if the dataset does not exist or cannot be reached, or lacks the subset or the text column.
    """
    loaded, fingerprint = load_dataset(config)
    for dataset in loaded.values():
        columns = columns_of(dataset)
        if not columns.get(config.text_column):
            texts = [name for name, holds_text in columns.items() if holds_text]
            problem = "has no text in column" if config.text_column in columns else "has no column"
            guess = nearest(config.text_column, texts) or next(iter(texts), None)
            raise DataError(
                f"dataset '{config.name}' {problem} '{config.text_column}', it has {', '.join(columns)}",
                f"--set dataset.text_column={guess}" if guess else "choose a dataset with a column of text",
            )
    rows: dict[str, Iterable[str]] = {
        str(split): Rows(dataset, config.text_column) for split, dataset in loaded.items()
    }
    return rows, fingerprint


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


def columns_of(dataset: datasets.Dataset | datasets.IterableDataset) -> dict[str, bool]:
    """The columns, and whether each holds text."""
    if dataset.features is not None:
        types = {name: getattr(column, "dtype", None) for name, column in dataset.features.items()}
        return {name: dtype in ("string", "large_string") for name, dtype in types.items()}
    # Some builders do not know before the first row is read.
    row: dict[str, Any] = next_of(iter(dataset)) or {}
    return {name: isinstance(value, str) for name, value in row.items()}


def load_dataset(
    config: DatasetConfig,
) -> tuple[datasets.DatasetDict | datasets.IterableDatasetDict, str]:
    """The splits, and a fingerprint of where they come from.

    Silent, and with the many exceptions of `datasets` as one kind of error.
    """
    datasets.disable_progress_bars()
    # Even errors are logged before they are raised, and those are told in our words.
    datasets.logging.set_verbosity(logging.CRITICAL)
    on_hub = config.name not in BUILDERS and not os.path.exists(config.name)
    offline = on_hub and (huggingface_hub.constants.HF_HUB_OFFLINE or not hub_reachable())
    options: dict[str, Any] = {}
    if config.name == "text":
        # A file is a document, unless the lines are to be grouped; then they need their line ends.
        whole = config.document_start is None
        options = {"sample_by": "document"} if whole else {"keep_linebreaks": True}
    if config.name in BUILDERS and not config.data_files:
        raise DataError(f"dataset '{config.name}' needs files to read", "name them: --set dataset.data_files=book.txt")
    if config.name.startswith((".", "/", "~")) and not os.path.exists(config.name):
        raise DataError(f"there is no dataset folder '{config.name}'", "check dataset.name")
    if os.path.isfile(config.name):
        ending = os.path.splitext(config.name)[1].removeprefix(".")
        raise DataError(
            f"dataset '{config.name}' is a file, not a folder",
            f"--set dataset.name={ending if ending in BUILDERS else 'text'} --set dataset.data_files={config.name}",
        )
    try:
        if offline:
            go_offline()
        if config.streaming:
            return open_stream(config, options)
        loaded = datasets.load_dataset(config.name, config.subset, data_files=config.data_files, **options)
        assert isinstance(loaded, datasets.DatasetDict)
        return loaded, " ".join(f"{split} {dataset._fingerprint}" for split, dataset in loaded.items())
    except Exception as error:
        raise data_error(config, error, offline) from None


def open_stream(config: DatasetConfig, options: dict[str, Any]) -> tuple[datasets.IterableDatasetDict, str]:
    """The splits as streams.

    A stream has no fingerprint of its own; that of its source is made of the files' names and their versions: the time
    of the last change, on the Hub the commit.
    """
    builder = datasets.load_dataset_builder(config.name, config.subset, data_files=config.data_files, **options)
    files: Any = builder.config.data_files or {}
    versions = [(str(split), list(paths), paths.origin_metadata) for split, paths in files.items()]
    loaded = builder.as_streaming_dataset()
    assert isinstance(loaded, datasets.IterableDatasetDict)
    return loaded, f"stream {builder.hash} {builder.config_id} {versions}"


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


def shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


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
