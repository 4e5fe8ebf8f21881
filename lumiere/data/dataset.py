"""A corpus as token ids on disk: built once for a corpus and a tokenizer, then memory-mapped from the cache."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lumiere.components.short_repr import ShortRepr
from lumiere.config.schema import DatasetConfig, RunConfig
from lumiere.data.batches import Windows
from lumiere.data.checksums import cache_dir, changed_files, write_checksums
from lumiere.data.corpus import SPLITS, Corpus, load_corpus, numbered_parts
from lumiere.data.encoding import (
    EMPTY,
    OFFSET_TYPE,
    SplitFacts,
    encode_parts,
    encode_split,
    id_type,
    measure,
    measured_batches,
    write_durably,
)
from lumiere.data.text import Part, parts
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import DataError, LumiereError, shortened
from lumiere.files import open_file, parse_json, read_file

UNFINISHED = ".building-"
UNFINISHED_DAYS = 14
"""After so many days without a change, an unfinished corpus is removed when another one is built."""


@dataclass(frozen=True)
class Progress:
    """How far a corpus is built: `done` of `total` documents (None: not known), and the text so far.

    With `is_note`, `stage` is a remark for the user.
    """

    stage: str
    done: int = 0
    total: int | None = None
    num_bytes: int = 0
    is_note: bool = False


Listener = Callable[[Progress], None]


def build_folder(folder: Path, corpus: Corpus, config: RunConfig, tell: Listener) -> bool:
    """Train the tokenizer and encode every split; go on where a former process was stopped.

    Returns:
        Whether it was built here, and not meanwhile by another process.

    Raises:
        DataError: if there is no text to train on, or none to validate on.
        LumiereError: if the cache cannot be written.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir() / "locks" / f"{folder.name}.lock", tell):
            if folder.is_dir():
                return False
            remove_forgotten(folder.parent)
            unfinished.mkdir(exist_ok=True)
            try:
                fill_folder(unfinished, corpus, config, tell)
            finally:
                with contextlib.suppress(OSError):  # of a corpus that cannot be read, nothing is left
                    unfinished.rmdir()
            write_checksums(unfinished)
            unfinished.rename(folder)
            return True
    except OSError as error:
        raise LumiereError(
            f"the cache {str(folder)!r} cannot be written: {error.strerror}", "set LUMIERE_CACHE_DIR"
        ) from None


@contextmanager
def locked(path: Path, tell: Listener) -> Iterator[None]:
    """Inside of it, no other process builds the same; the lock goes with the process, however that ends."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        tell(Progress("waiting for another process, which encodes the same corpus"))
        lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()


def remove_forgotten(folder: Path) -> None:
    """Remove what was begun long ago and never finished, since its corpus or its config may be gone."""
    for path in folder.glob(UNFINISHED + "*"):
        last_change = max((file.stat().st_mtime for file in [path, *path.glob("*")]), default=0.0)
        if time.time() - last_change > UNFINISHED_DAYS * 86_400:
            shutil.rmtree(path, ignore_errors=True)


def fill_folder(folder: Path, corpus: Corpus, config: RunConfig, tell: Listener) -> None:
    """Everything of a corpus: `tokenizer.json`, ids and offsets of each split, and their facts in `splits.json`."""
    splits = [split for split in corpus.splits if next(corpus.parts(split), None) is not None]
    for split in ("train", "validation"):
        if split not in splits:
            shutil.rmtree(folder)
            raise DataError(
                f"the {split} split of dataset '{config.dataset.name}' holds no text",
                "check dataset.name, dataset.data_files and dataset.text_column",
            )
    if corpus.unused:
        tell(Progress(f"splits of {config.dataset.name} that are not used: {', '.join(corpus.unused)}", is_note=True))
    path = folder / "tokenizer.json"
    if not path.exists():
        settings = config.tokenizer
        tokenizer = Tokenizer.train(
            beginning(corpus.parts("train"), settings.sample_bytes),
            settings.vocab_size,
            settings.min_frequency,
            settings.normalizer,
            tell=lambda num_bytes: tell(Progress("training the tokenizer", num_bytes=num_bytes)),
        )
        write_durably(path, tokenizer.to_json())
    # From the file also where it was trained just now, so that going on gives the same.
    tokenizer = Tokenizer.load(path)
    facts = {}
    for split in splits:
        stage, total = f"encoding the {split} split", corpus.counts.get(split)

        def tell_count(facts: SplitFacts, stage: str = stage, total: int | None = total) -> None:
            tell(Progress(stage, facts.num_documents, total, facts.num_bytes))

        facts[split] = asdict(
            encode_split(folder, split, lambda split=split: corpus.parts(split), tokenizer, tell_count)
        )
    for split, rows in corpus.rows.items():
        if rows.num_empty:
            note = f"{split}: {rows.num_empty:,} of {rows.num_rows:,} rows are empty and left out"
            tell(Progress(note, is_note=True))
    write_durably(folder / "splits.json", json.dumps(facts, indent=2))
    for journal in folder.glob("*.journal"):
        journal.unlink()


def beginning(parts: Iterable[Part], num_bytes: int) -> Iterator[str]:
    """The first parts of documents, up to `num_bytes` of UTF-8, and at least one."""
    for text, _ in parts:
        yield text
        num_bytes -= len(text.encode(errors="replace"))
        if num_bytes <= 0:
            return


CACHE_FORMAT = 2
MAX_FACTS_BYTES = 10_000
IDS_AT_ONCE = 2**22
"""Whose bytes are looked up at once."""


@dataclass(frozen=True)
class TokenizedSplit(ShortRepr):
    """The ids of one split, mapped from the disk where it comes from the cache.

    Attributes:
        ids: (num_tokens,) all documents one after the other.
        offsets: (num_documents + 1,) where each starts, and where the last one ends.
        vocab_size: ids are less than this.
        path: of its files, without their endings; None where it has none.
    """

    ids: np.ndarray
    offsets: np.ndarray
    facts: SplitFacts
    vocab_size: int
    path: Path | None = None

    def windows(self, context_size: int, sliding_window_size: int, shifts: bool = False) -> Windows:
        return Windows(self.ids, self.offsets, context_size, sliding_window_size, shifts, self.vocab_size, self.path)


@dataclass(frozen=True)
class TokenizedCorpus:
    """A tokenizer and the splits that it encoded.

    Attributes:
        fingerprint: SHA-256 of the text of all splits and of the tokenizer.
        from_cache: whether it was there already.
    """

    tokenizer: Tokenizer
    splits: Mapping[str, TokenizedSplit]
    fingerprint: str
    from_cache: bool

    def windows(self, split: str, config: RunConfig) -> Windows:
        """The windows of a split as `config` cuts them.

        Raises:
            DataError: if the corpus has no such split.
        """
        if split not in self.splits:
            raise DataError(f"the corpus has no split '{split}'", f"it has {', '.join(self.splits)}")
        sizes = (config.model.context_size, config.dataset.sliding_window_size)
        return self.splits[split].windows(*sizes, shifts=config.training.random_window_offset and split == "train")


def tokenize_corpus(
    config: RunConfig, listener: Listener | None = None, corpus: Corpus | None = None, verify: bool = False
) -> TokenizedCorpus:
    """The corpus of `config` in ids, from the cache if it is there.

    Args:
        listener: called as the work goes on.
        corpus: what `load_corpus(config.dataset)` gives, where it was called already.
        verify: compare the ids in the cache with their checksums, even if their files look unchanged.

    Raises:
        DataError: if the corpus cannot be read or holds no text, or its ids in the cache have changed.
    """
    tell = listener or (lambda _: None)
    tell(Progress("reading the corpus"))
    corpus = corpus or load_corpus(config.dataset)
    # Left out where it is the default, so that corpora of versions without this setting are found.
    settings = config.tokenizer.model_dump(exclude={"normalizer"} if config.tokenizer.normalizer == "nfkc" else None)
    identity = json.dumps([CACHE_FORMAT, corpus.fingerprint, settings], sort_keys=True)
    folder = cache_dir() / "corpora" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    is_cached = os.path.isdir(folder) or not build_folder(folder, corpus, config, tell)
    if corpus.missing is not None:
        tell(Progress(f"{corpus.missing.message}; the encoded corpus in the cache is used", is_note=True))
    tokenized = read_folder(folder, from_cache=is_cached, verify=verify)
    if len(tokenized.tokenizer) > config.tokenizer.vocab_size:
        raise damaged(folder, f"its tokenizer has {len(tokenized.tokenizer):,} tokens")
    return tokenized


def source_parts(config: DatasetConfig, corpus: TokenizedCorpus, split: str) -> tuple[Iterable[Part], bool]:
    """Return the documents of a split that was encoded, in parts, and whether they are decoded from its ids.

    They are read from their source; decoded only if its files are gone or have changed, for then they are normalized.
    """
    source = load_corpus(config)
    if source.missing is None:
        return source.parts(split), False
    ids, offsets = corpus.splits[split].ids, corpus.splits[split].offsets
    documents = (corpus.tokenizer.decode(ids[begin:end].tolist()) for begin, end in pairwise(offsets))
    return (Part(text, True) for text in documents), True


@dataclass(frozen=True)
class Sizes:
    """What is counted in each document of a split: arrays (num_documents,).

    Attributes:
        num_bytes: UTF-8 bytes.
        num_words: words by white space, line ends counted.
        num_normalized_bytes: UTF-8 bytes after the tokenizer's normalizer.
        num_changed_bytes: UTF-8 bytes of the characters that the normalizer changed.
    """

    num_bytes: np.ndarray
    num_words: np.ndarray
    num_normalized_bytes: np.ndarray
    num_changed_bytes: np.ndarray


def tokenize_text(text: str, tokenizer: Tokenizer) -> TokenizedSplit:
    """A single text as a split of one document.

    Raises:
        DataError: if it holds no text.
    """
    if not text.strip():
        raise DataError("the text is empty", "give some text")
    return tokenize_parts(parts([text]), tokenizer)


def tokenize_parts(documents: Iterable[Part], tokenizer: Tokenizer) -> TokenizedSplit:
    """A split in memory, for a text that no model was trained on: nothing is kept.

    Raises:
        DataError: if it holds no text.
    """
    dtype = id_type(len(tokenizer))
    ids, ends = [], [np.zeros(1, OFFSET_TYPE)]
    state, num_tokens = EMPTY, 0
    for batch in measured_batches(iter(documents), EMPTY):
        encoded = encode_parts(batch.parts, state.is_within, tokenizer)
        lengths = num_tokens + np.cumsum(list(map(len, encoded)), dtype=OFFSET_TYPE)
        ids.append(np.concatenate([np.array(row, dtype) for row in encoded]))
        ends.append(lengths[[part.is_last for part in batch.parts]])
        state, num_tokens = batch.state, int(lengths[-1])
    if not ids:
        raise DataError("the corpus holds no text", "choose another split or dataset")
    joined = np.concatenate(ids)
    num_normalized = bytes_of_documents(joined, np.array([0, num_tokens]), tokenizer).item()
    facts = replace(state.facts, num_tokens=num_tokens, num_normalized_bytes=num_normalized)
    return TokenizedSplit(joined, np.concatenate(ends), facts, len(tokenizer))


def document_sizes(
    documents: Iterable[Part], split: TokenizedSplit, tokenizer: Tokenizer, are_decoded: bool = False
) -> Sizes:
    """What is counted in each document of a split.

    Args:
        are_decoded: the documents are decoded from ids, so that their sizes are those after normalization.

    Raises:
        DataError: if the documents are not those of the split.
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
        raise DataError("the corpus has changed while it was read", "try again, or restore it as it was")
    num_bytes, num_words, num_changed = counts
    return Sizes(num_bytes, num_words, bytes_of_documents(split.ids, split.offsets, tokenizer), num_changed)


def bytes_of_documents(ids: np.ndarray, offsets: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The number of bytes that the ids of each document stand for: (num_documents,)."""
    sizes = np.array(tokenizer.token_sizes)
    totals = np.zeros(len(offsets) - 1, np.int64)
    for first in range(0, len(ids), IDS_AT_ONCE):
        end = min(first + IDS_AT_ONCE, len(ids))
        begun = np.searchsorted(offsets, first, side="right") - 1
        ended = np.searchsorted(offsets, end, side="left")
        # Clipped, because files may be damaged; cutting windows of them raises an error.
        starts = np.clip(offsets[begun:ended] - first, 0, end - first - 1)
        totals[begun:ended] += np.add.reduceat(np.take(sizes, ids[first:end], mode="clip"), starts)
    return totals


def read_folder(folder: Path, from_cache: bool, verify: bool = False) -> TokenizedCorpus:
    """Map a folder that `build_folder` made into memory.

    Raises:
        DataError: if files are missing or damaged.
    """
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        facts = parse_json(read_file(folder / "splits.json", MAX_FACTS_BYTES))
        if not isinstance(facts, dict):
            raise ValueError("it says nothing of its splits")
        # By the names of the splits and not by the file's: those could lead out of the folder.
        splits = {split: read_split(folder, split, tokenizer, facts[split]) for split in SPLITS if split in facts}
        changed = changed_files(folder, verify)
    except (OSError, ValueError, TypeError, DataError) as error:
        raise damaged(folder, error.message if isinstance(error, DataError) else shortened(str(error))) from None
    if changed:
        raise damaged(folder, f"{', '.join(changed)} changed after being written")
    if facts.keys() != splits.keys() or not {"train", "validation"} <= splits.keys():
        raise damaged(folder, f"it has the splits {shortened(', '.join(facts))}")
    identity = json.dumps([{split: fields["sha256"] for split, fields in facts.items()}, tokenizer.fingerprint])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return TokenizedCorpus(tokenizer, splits, fingerprint, from_cache)


def read_split(folder: Path, split: str, tokenizer: Tokenizer, fields: Mapping[str, Any]) -> TokenizedSplit:
    """Map one split's files into memory, and see that they fit each other.

    Its ids and offsets are not read, since there may be billions; `Windows` checks those that it meets.

    Raises:
        OSError, ValueError, TypeError: if they do not, or are damaged.
    """
    ids = mapped(folder / f"{split}.ids", id_type(len(tokenizer)))
    offsets = mapped(folder / f"{split}.offsets", OFFSET_TYPE)
    if "num_normalized_bytes" not in fields:  # nor in the caches of older versions
        fields = {**fields, "num_normalized_bytes": bytes_of_documents(ids, np.array([0, len(ids)]), tokenizer).item()}
    facts = SplitFacts(**fields)
    if not facts.is_sound:
        raise ValueError(f"the facts about its {split} split are no facts")
    if (len(offsets), len(ids)) != (facts.num_documents + 1, facts.num_tokens):
        raise ValueError(f"its {split} split is cut short")
    if (offsets[0], offsets[-1]) != (0, facts.num_tokens):
        raise ValueError(f"its {split} split has offsets of another text")
    return TokenizedSplit(ids, offsets, facts, len(tokenizer), folder / split)


def mapped(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """The numbers in a file, read only where and when they are looked at.

    Raises:
        OSError, ValueError: if it is no file, or no whole number of them.
    """
    open_file(path).close()  # of a pipe, NumPy would wait for an end
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def damaged(folder: Path, reason: str) -> DataError:
    return DataError(f"the cached corpus in {str(folder)!r} is damaged: {reason}", "delete that folder")
