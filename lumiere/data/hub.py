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

BUILDERS = ("text", "json", "csv", "parquet")
NO_NETWORK_SECONDS = 2.0
"""How long to wait for the Hub's host before it counts as out of reach."""


@dataclass(frozen=True)
class Rows:
    """One column of one split, read anew at each iteration and never whole in memory."""

    dataset: datasets.Dataset
    column: str

    def __iter__(self) -> Iterator[str]:
        for batch in self.dataset.select_columns(self.column).iter(batch_size=1000):
            for row in batch[self.column]:  # pyright: ignore[reportArgumentType, reportCallIssue]
                yield "" if row is None else row


def load_rows(config: DatasetConfig) -> tuple[dict[str, Iterable[str]], str]:
    """The rows of each split, and a fingerprint of where they come from.

    Raises:
        DataError: if the dataset does not exist or cannot be reached, or lacks the subset or the text column.
    """
    loaded = load_dataset(config)
    fingerprints = []
    for split, dataset in loaded.items():
        texts = [name for name, column in dataset.features.items() if is_text(column)]
        if config.text_column not in texts:
            problem = "has no text in column" if config.text_column in dataset.features else "has no column"
            guess = nearest(config.text_column, texts) or next(iter(texts), None)
            raise DataError(
                f"dataset '{config.name}' {problem} '{config.text_column}', it has {', '.join(dataset.column_names)}",
                f"--set dataset.text_column={guess}" if guess else "choose a dataset with a column of text",
            )
        fingerprints.append(f"{split} {dataset._fingerprint}")
    rows: dict[str, Iterable[str]] = {
        str(split): Rows(dataset, config.text_column) for split, dataset in loaded.items()
    }
    return rows, " ".join(fingerprints)


def is_text(column: object) -> bool:
    return getattr(column, "dtype", None) in ("string", "large_string")


def load_dataset(config: DatasetConfig) -> datasets.DatasetDict:
    """`datasets.load_dataset`, silent, and with its many exceptions as one kind of error."""
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
        return datasets.load_dataset(config.name, config.subset, data_files=config.data_files, **options)  # pyright: ignore[reportReturnType]
    except Exception as error:
        raise data_error(config, error, offline) from None


def data_error(config: DatasetConfig, error: Exception, offline: bool) -> DataError:
    """What went wrong in `datasets`, in our words.

    Raised classes differ between its versions (`DatasetNotFoundError`, `FileNotFoundError`, `ConnectionError`,
    `ValueError` for a subset), so the cases are told apart by what was asked for, not by class alone.
    """
    # The class that says what was going on when a file could not be read names the reason as its cause.
    told = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
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
