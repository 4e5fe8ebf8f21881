"""Datasets whose files the `datasets` library resolves: those of the Hub, and folders with a README.

Only its builders for plain data are accepted. Others may run code that they read: `pandas` unpickles. Even of those,
Lumiere reads the files itself.
"""

import logging
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import datasets.config
import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import HFValidationError

from lumiere.config.schema import DatasetConfig
from lumiere.data.sources import BUILDERS, Source, has_subsets, local, plain_folder
from lumiere.errors import DataError, nearest, shortened
from lumiere.files import is_writable

PREPARED = "cache"
"""Builder of the Arrow files that `datasets` prepared before, which it falls back to offline."""
KEPT_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
"""Options of a builder that a dataset may set."""
NO_NETWORK_SECONDS = 2.0
"""Timeout for connecting to the Hub."""


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


def described_folder(config: DatasetConfig, folder: str) -> Source:
    """Return the source of a folder whose README assigns files to subsets and splits."""
    with errors_in_our_words(config):
        _, source = resolve(config, folder)
        return replace(source, files={split: list(map(local, paths)) for split, paths in source.files.items()})


def hub_source(config: DatasetConfig) -> Source:
    """Return the source of a dataset on the Hub, downloading its files unless they are to be streamed."""
    offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE) or not hub_reachable()
    with errors_in_our_words(config, offline):
        if offline:
            # For this process. Both libraries have already read the environment.
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        try:
            builder, source = resolve(config, config.name)
        except DataError:
            raise
        except Exception:
            # Files that were downloaded, but never prepared by `datasets`.
            if not offline or not (folder := downloaded(config.name)):
                raise
            return described_folder(config, folder) if has_subsets(folder) else plain_folder(config, folder)
        if source.builder == PREPARED:
            splits: Any = builder.as_dataset()
            prepared = {str(split): [file["filename"] for file in rows.cache_files] for split, rows in splits.items()}
            return Source("arrow", prepared)
        if config.streaming and source.builder != "text":
            files: Any = builder.config.data_files or {}
            versions = [(str(split), list(paths), paths.origin_metadata) for split, paths in files.items()]
            return replace(source, version=f"stream {builder.hash} {builder.config_id} {versions}")
        manager = datasets.DownloadManager(dataset_name=config.name, download_config=datasets.DownloadConfig())
        return replace(source, files={split: manager.download(paths) for split, paths in source.files.items()})


def downloaded(name: str) -> str | None:
    """Return the folder of a dataset that was downloaded from the Hub, or None."""
    try:
        return huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
    except Exception:  # errors of several families
        return None


def resolve(config: DatasetConfig, path: str) -> tuple[datasets.DatasetBuilder, Source]:
    """Return what `datasets` makes of a folder or a Hub name, before it reads any data.

    Raises:
        DataError: It needs a builder that does more than read plain data, and might run code, or sets options of a
            builder, which Lumiere would ignore.
    """
    files = config.data_files
    for entries in files.values() if isinstance(files, dict) else [files or []]:
        for entry in [entries] if isinstance(entries, str) else entries:
            local(entry)  # rejects URLs
    with warnings.catch_warnings(action="ignore"):  # deprecations of builders, which are rejected below anyway
        builder = datasets.load_dataset_builder(path, config.subset, data_files=files)
    module, options = type(builder).__module__, builder.config
    name = module.rpartition(".")[2]
    if name not in (*BUILDERS, PREPARED) or module != f"datasets.packaged_modules.{name}.{name}":
        raise DataError(
            f"dataset '{config.name}' needs the builder '{name}' of datasets, which might run code",
            f"convert it to one of these formats: {', '.join(BUILDERS)}",
        )
    for option in fields(options):
        if option.name not in KEPT_OPTIONS and getattr(options, option.name) != option.default and name != PREPARED:
            raise DataError(
                f"dataset '{config.name}' sets the option '{option.name}' of the builder '{name}'",
                "Lumiere does not support it: convert the dataset to parquet",
            )
    separator = getattr(options, "sep", ",")
    paths = {str(split): list(paths) for split, paths in (options.data_files or {}).items()}
    return builder, Source(name, paths, None if separator == "," else separator)


def data_error(config: DatasetConfig, error: Exception, offline: bool) -> DataError:
    """Describe an exception of `datasets`.

    Exception classes differ between its versions (`DatasetNotFoundError`, `FileNotFoundError`, `ConnectionError`,
    `ValueError` for a subset), so cases are distinguished by what was asked for, not by class alone.
    """
    for cache in (str(datasets.config.HF_DATASETS_CACHE), huggingface_hub.constants.HF_HUB_CACHE):
        if isinstance(error, OSError) and not is_writable(cache):
            return DataError(
                f"the cache of datasets, {cache!r}, cannot be written: {error.strerror or error}",
                "set LUMIERE_CACHE_DIR or HF_HOME to a writable folder",
            )
    reason = " ".join(str(error).split()) or type(error).__name__
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
