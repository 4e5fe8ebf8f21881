"""A corpus as token ids on disk: encoded once per corpus and tokenizer, then memory-mapped from the cache.

One process at a time builds a corpus, in a folder that gets its final name only when complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from lumiere.components.short_repr import ShortRepr
from lumiere.config.schema import DatasetConfig, RunConfig
from lumiere.data.batches import Windows
from lumiere.data.checksums import cache_dir, changed_files, write_checksums
from lumiere.data.corpus import Corpus, load_corpus, numbered_parts
from lumiere.data.encoding import (
    FACTS,
    OFFSET_TYPE,
    SplitFacts,
    encode_split,
    encoded_batches,
    id_type,
    measure,
)
from lumiere.data.foreign_tokenizer import load_tokenizer
from lumiere.data.sources import SPLITS
from lumiere.data.text import Part, parts
from lumiere.data.tokenizer import TOKENIZER_NAME, Tokenizer
from lumiere.errors import DataError, LumiereError, shortened
from lumiere.files import DISK, read_file

CACHE_FORMAT = 2
MAX_FACTS_BYTES = 10_000
IDS_AT_ONCE = 2**22
"""Ids whose bytes are counted in one step."""
UNFINISHED = ".building-"
UNFINISHED_DAYS = 14
"""Unfinished corpora that have not changed for longer are removed when another one is built."""


@dataclass(frozen=True)
class Progress:
    """Progress of building a corpus: `done` of `total` documents (None: unknown), and bytes of text so far.

    With `is_note`, `stage` is a note for the user.
    """

    stage: str
    done: int = 0
    total: int | None = None
    num_bytes: int = 0
    is_note: bool = False


Callback = Callable[[Progress], None]


@dataclass(frozen=True)
class TokenizedSplit(ShortRepr):
    """The ids of one split, memory-mapped if they come from the cache.

    Attributes:
        ids: (num_tokens,), all documents concatenated.
        offsets: (num_documents + 1,), where each document starts, and where the last one ends.
        vocab_size: Ids are less than this.
        path: Path of the files without their endings; None for a split in memory.
    """

    ids: np.ndarray
    offsets: np.ndarray
    facts: SplitFacts
    vocab_size: int
    path: Path | None = None

    def windows(
        self, context_size: int, sliding_window_size: int, shifts: bool = False, only_last: bool = False
    ) -> Windows:
        """Return the windows; the arguments are those of `Windows`.

        Raises:
            DataError: With `only_last`, no document has a token to predict.
        """
        sizes = (context_size, sliding_window_size)
        windows = Windows(self.ids, self.offsets, *sizes, shifts, self.vocab_size, self.path, only_last)
        if only_last and not len(windows):
            raise DataError("no document has two tokens, the last of which could be predicted", "use longer documents")
        return windows


@dataclass(frozen=True)
class TokenizedCorpus:
    """A tokenizer and the splits that it encoded.

    Attributes:
        fingerprint: SHA-256 of the text of all splits and of the tokenizer.
        from_cache: Whether it was encoded before.
    """

    tokenizer: Tokenizer
    splits: Mapping[str, TokenizedSplit]
    fingerprint: str
    from_cache: bool

    def windows(self, split: str, config: RunConfig) -> Windows:
        """Return the windows of a split as `config` cuts them.

        Raises:
            DataError: The corpus has no such split.
        """
        if split not in self.splits:
            raise DataError(f"the corpus has no split '{split}'", f"it has {', '.join(self.splits)}")
        sizes = (config.model.context_size, config.dataset.sliding_window_size)
        shifts = config.training.random_window_offset and split == "train"
        return self.splits[split].windows(*sizes, shifts, config.training.loss_positions == "last")


@dataclass(frozen=True)
class Sizes:
    """Sizes of each document of a split: arrays (num_documents,).

    Attributes:
        num_bytes: UTF-8 bytes.
        num_words: White-space separated words, line ends counted as words.
        num_normalized_bytes: UTF-8 bytes after the tokenizer's normalizer.
        num_changed_bytes: UTF-8 bytes of the characters that the normalizer changed.
    """

    num_bytes: np.ndarray
    num_words: np.ndarray
    num_normalized_bytes: np.ndarray
    num_changed_bytes: np.ndarray


def tokenize_corpus(
    config: RunConfig,
    emit: Callback | None = None,
    corpus: Corpus | None = None,
    verify: bool = False,
    tokenizer: Tokenizer | None = None,
) -> TokenizedCorpus:
    """Return the encoded corpus of `config`, from the cache if it is there.

    Args:
        emit: Called with the progress.
        corpus: The result of `load_corpus(config.dataset)`, if already loaded.
        verify: Compare the cached ids with their checksums even if the files look unchanged.
        tokenizer: The tokenizer to encode with, that of another run. None: one that is trained on the corpus.

    Raises:
        DataError: The corpus cannot be read or holds no text, or its cached ids have changed.
    """
    emit = emit or (lambda _: None)
    emit(Progress("reading the corpus"))
    corpus = corpus or load_corpus(config.dataset)
    # The default normalizer is left out, so that corpora of versions without this setting are found.
    left_out = {"path", "normalizer"} if config.tokenizer.normalizer == "nfkc" else {"path"}
    settings = config.tokenizer.model_dump(exclude=left_out)
    if tokenizer is not None:
        settings = {"tokenizer_sha256": tokenizer.fingerprint}
    identity = json.dumps([CACHE_FORMAT, corpus.fingerprint, settings], sort_keys=True)
    folder = cache_dir() / "corpora" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    is_cached = os.path.isdir(folder) or not build_folder(folder, corpus, config, emit, tokenizer)
    if corpus.missing is not None:
        emit(Progress(f"{corpus.missing.message}; using the encoded corpus in the cache", is_note=True))
    return read_folder(folder, from_cache=is_cached, verify=verify)


# Building


def build_folder(
    folder: Path, corpus: Corpus, config: RunConfig, emit: Callback, tokenizer: Tokenizer | None = None
) -> bool:
    """Train the tokenizer, unless there is one, and encode every split, resuming after an interruption.

    Returns:
        Whether this process built it, rather than another one in the meantime.

    Raises:
        DataError: There is no text to train on, or none to validate on.
        LumiereError: The cache cannot be written.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir() / "locks" / f"{folder.name}.lock", emit):
            if folder.is_dir():
                return False
            remove_stale(folder.parent)
            unfinished.mkdir(exist_ok=True)
            try:
                fill_folder(unfinished, corpus, config, emit, tokenizer)
            finally:
                with contextlib.suppress(OSError):  # removed if empty: the corpus could not be read
                    unfinished.rmdir()
            write_checksums(unfinished)
            unfinished.rename(folder)
            return True
    except OSError as error:
        problem = f"the cache {str(folder)!r} cannot be written: {error.strerror}"
        raise LumiereError(problem, "set LUMIERE_CACHE_DIR") from None


def locked(path: Path, emit: Callback) -> AbstractContextManager[object]:
    """Take an exclusive lock on building a corpus; the system releases it however the process ends."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        emit(Progress("waiting for another process that is encoding the same corpus"))
        return lock.acquire(poll_interval=0.1)


def remove_stale(folder: Path) -> None:
    """Remove unfinished corpora that have not changed for long: their source or config may be gone."""
    for path in folder.glob(UNFINISHED + "*"):
        last_change = max((file.stat().st_mtime for file in [path, *path.glob("*")]), default=0.0)
        if time.time() - last_change > UNFINISHED_DAYS * 86_400:
            shutil.rmtree(path, ignore_errors=True)


def fill_folder(
    folder: Path, corpus: Corpus, config: RunConfig, emit: Callback, tokenizer: Tokenizer | None = None
) -> None:
    """Write the files of the tokenizer, the ids and offsets of each split, and their facts in `splits.json`."""
    splits = [split for split in corpus.splits if next(corpus.parts(split), None) is not None]
    for split in ("train", "validation"):
        if split not in splits:
            shutil.rmtree(folder)
            raise DataError(
                f"the {split} split of dataset '{config.dataset.name}' holds no text",
                "check dataset.name, dataset.data_files and dataset.text_column",
            )
    if corpus.unused:
        emit(Progress(f"unused splits of {config.dataset.name}: {', '.join(corpus.unused)}", is_note=True))
    path = folder / TOKENIZER_NAME
    if not path.exists():
        settings = config.tokenizer
        tokenizer = tokenizer or Tokenizer.train(
            sample(corpus.parts("train"), settings.sample_bytes),
            settings.vocab_size,
            settings.min_frequency,
            settings.normalizer,
            emit=lambda num_bytes: emit(Progress("training the tokenizer", num_bytes=num_bytes)),
        )
        for name, text in reversed(tokenizer.files().items()):  # `tokenizer.json` last: the others belong to it
            DISK.write(folder / name, text.encode())
    # Loaded even if it was just trained, so that a resumed pass gives the same ids.
    tokenizer = load_tokenizer(path)
    facts = {}
    for split in splits:

        def emit_facts(facts: SplitFacts, split: str = split) -> None:
            total = corpus.counts.get(split)
            emit(Progress(f"encoding the {split} split", facts.num_documents, total, facts.num_bytes))

        read = corpus.readers[split]
        facts[split] = asdict(encode_split(folder, split, read, tokenizer, emit_facts))
    for split, rows in corpus.rows.items():
        if rows.num_empty:
            note = f"{split}: skipped {rows.num_empty:,} of {rows.num_rows:,} rows, which are empty"
            emit(Progress(note, is_note=True))
    DISK.write(folder / "splits.json", json.dumps(facts, indent=2).encode())
    # An interrupted write leaves its temporary file.
    for path in (*folder.glob("*.journal"), *folder.glob(".*.tmp")):
        path.unlink()


def sample(parts: Iterable[Part], num_bytes: int) -> Iterator[str]:
    """Yield the first parts of documents: `num_bytes` of UTF-8, rounded up to a whole part."""
    for text, _ in parts:
        yield text
        num_bytes -= len(text.encode(errors="replace"))
        if num_bytes <= 0:
            return


# Reading


def read_folder(folder: Path, from_cache: bool, verify: bool = False) -> TokenizedCorpus:
    """Map a folder that `build_folder` made into memory.

    Raises:
        DataError: Files are missing or damaged.
    """
    try:
        tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
        facts = read_facts(folder / "splits.json")
        # By our names of the splits: those in the file could lead out of the folder.
        splits = {split: read_split(folder, split, tokenizer, facts[split]) for split in SPLITS if split in facts}
        changed = changed_files(folder, verify)
    except (OSError, ValueError, DataError) as error:
        raise damaged(folder, error.message if isinstance(error, DataError) else shortened(str(error))) from None
    if changed:
        raise damaged(folder, f"{', '.join(changed)} changed after being written")
    if facts.keys() != splits.keys() or not {"train", "validation"} <= splits.keys():
        raise damaged(folder, f"it has the splits {shortened(', '.join(facts))}")
    identity = json.dumps([{split: own.sha256 for split, own in facts.items()}, tokenizer.fingerprint])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return TokenizedCorpus(tokenizer, splits, fingerprint, from_cache)


def read_facts(path: Path) -> dict[str, SplitFacts]:
    """Read the facts of each split.

    Raises:
        OSError, ValueError: The file is missing or damaged.
    """
    try:
        return FACTS.validate_json(read_file(path, MAX_FACTS_BYTES))
    except ValidationError:
        raise ValueError(f"{path.name} does not hold the facts of splits") from None


def read_split(folder: Path, split: str, tokenizer: Tokenizer, facts: SplitFacts) -> TokenizedSplit:
    """Map the files of one split into memory, and check that they belong together.

    Does not read the ids and offsets, of which there may be billions; `Windows` checks those that it touches.

    Raises:
        OSError, ValueError: The files do not belong together, or are damaged.
    """
    ids = np.asarray(np.memmap(folder / f"{split}.ids", id_type(len(tokenizer)), "r"))
    offsets = np.asarray(np.memmap(folder / f"{split}.offsets", OFFSET_TYPE, "r"))
    if (len(offsets), len(ids)) != (facts.num_documents + 1, facts.num_tokens):
        raise ValueError(f"its {split} split is truncated")
    if (offsets[0], offsets[-1]) != (0, facts.num_tokens):
        raise ValueError(f"its {split} split has offsets of another text")
    if not facts.num_normalized_bytes:
        num_normalized = bytes_of_documents(ids, np.array([0, len(ids)]), tokenizer).item()
        facts = replace(facts, num_normalized_bytes=num_normalized)
    return TokenizedSplit(ids, offsets, facts, len(tokenizer), folder / split)


def damaged(folder: Path, reason: str) -> DataError:
    return DataError(f"the cached corpus in {str(folder)!r} is damaged: {reason}", "delete that folder")


# Texts outside of the cache, and sizes of documents


def tokenize_text(text: str, tokenizer: Tokenizer) -> TokenizedSplit:
    """Encode a single text as a split of one document.

    Raises:
        DataError: It is blank.
    """
    if not text.strip():
        raise DataError("the text is empty", "give some text")
    return tokenize_parts(parts([text]), tokenizer)


def tokenize_parts(documents: Iterable[Part], tokenizer: Tokenizer) -> TokenizedSplit:
    """Encode documents as a split in memory, without the cache.

    Raises:
        DataError: They hold no text.
    """
    batches = list(encoded_batches(iter(documents), tokenizer))
    if not batches:
        raise DataError("the corpus holds no text", "choose another split or dataset")
    ids, ends, states = zip(*batches, strict=True)
    offsets = np.concatenate([np.zeros(1, OFFSET_TYPE), *ends])
    return TokenizedSplit(np.concatenate(ids), offsets, states[-1].facts, len(tokenizer))


def source_parts(config: DatasetConfig, corpus: TokenizedCorpus, split: str) -> tuple[Iterable[Part], bool]:
    """Return the documents of an encoded split in parts, and whether they are decoded from its ids.

    They are read from their source, or decoded, and thus normalized, if its files are gone or have changed.
    """
    source = load_corpus(config)
    if source.missing is None:
        return source.parts(split), False
    ids, offsets = corpus.splits[split].ids, corpus.splits[split].offsets
    documents = (corpus.tokenizer.decode(ids[begin:end].tolist()) for begin, end in pairwise(offsets))
    return (Part(text, True) for text in documents), True


def document_sizes(
    documents: Iterable[Part], split: TokenizedSplit, tokenizer: Tokenizer, are_decoded: bool = False
) -> Sizes:
    """Return the sizes of each document of a split.

    Args:
        are_decoded: Whether the documents were decoded from ids, so that their sizes are those after normalization.

    Raises:
        DataError: The documents are not those of the split.
    """
    facts = split.facts
    counts = np.zeros((3, facts.num_documents), np.int64)
    num_documents = 0
    for number, (text, is_last) in numbered_parts(documents):
        if number < facts.num_documents:
            counts[:, number] += (*measure(text), tokenizer.num_bytes_changed(text))
        num_documents += is_last
    sums = counts[:2].sum(1).tolist()
    if num_documents != facts.num_documents or not (are_decoded or sums == [facts.num_bytes, facts.num_words]):
        raise DataError("the corpus has changed while it was read", "try again, or restore it")
    num_bytes, num_words, num_changed = counts
    return Sizes(num_bytes, num_words, bytes_of_documents(split.ids, split.offsets, tokenizer), num_changed)


def bytes_of_documents(ids: np.ndarray, offsets: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of bytes that the ids of each document spell: (num_documents,)."""
    sizes = np.array(tokenizer.token_sizes)
    totals = np.zeros(len(offsets) - 1, np.int64)
    for first in range(0, len(ids), IDS_AT_ONCE):
        end = min(first + IDS_AT_ONCE, len(ids))
        begun = np.searchsorted(offsets, first, side="right") - 1
        ended = np.searchsorted(offsets, end, side="left")
        # Clipped because offsets may be damaged, which `Windows` reports.
        starts = np.clip(offsets[begun:ended] - first, 0, end - first - 1)
        totals[begun:ended] += np.add.reduceat(np.take(sizes, ids[first:end], mode="clip"), starts)
    return totals
