"""Documents into ids on disk: batch by batch, and so that an encoding that was stopped goes on where it was.

A split becomes two files, `train.ids` and `train.offsets`, that grow as the documents come, and a journal of how far
they are whole. One file of any size is as good to map into memory as many small ones, and cheaper to address.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from lumiere.data.tokenizer import Tokenizer, not_a_character
from lumiere.files import parse_json, read_file

BATCH_BYTES = 4_000_000
"""Text encoded in one call: enough to keep all cores busy, little enough to hold its ids beside it."""
BATCH_DOCUMENTS = 1024
JOURNAL_BYTES = 64_000_000
"""Text after which the files are flushed, and the journal says so: at most this much is encoded twice."""
MAX_JOURNAL_BYTES = 10_000
OFFSET_TYPE = np.int64


@dataclass(frozen=True)
class SplitFacts:
    """What is known of a split's text.

    Attributes:
        num_bytes: UTF-8 bytes of its documents, before normalization.
        num_words: words by white space, line ends counted as words.
        sha256: of its documents.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_words: int
    sha256: str

    @property
    def num_targets(self) -> int:
        """Tokens that a model predicts, each counted once: all but each document's first."""
        return self.num_tokens - self.num_documents

    @property
    def is_sound(self) -> bool:
        """Whether these are facts at all: of a file that anybody may have written, they are what stood there."""
        counts = (self.num_documents, self.num_tokens, self.num_bytes, self.num_words)
        return all(isinstance(count, int) and count > 0 for count in counts) and isinstance(self.sha256, str)


EMPTY = SplitFacts(0, 0, 0, 0, hashlib.sha256().hexdigest())


@dataclass(frozen=True)
class Batch:
    """Documents to be encoded together, and the facts of the split up to them, but for the tokens."""

    documents: Sequence[str]
    facts: SplitFacts


class ChangedError(Exception):
    """What was encoded before is not what comes now, or not what is on the disk."""


def id_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_split(
    folder: Path,
    split: str,
    read: Callable[[], Iterator[str]],
    tokenizer: Tokenizer,
    tell: Callable[[int], None],
) -> SplitFacts:
    """Write the ids and offsets of a split into `folder`, or what is missing of them.

    The result is the same, byte for byte, however often it was stopped on the way.

    Args:
        read: starts to read its documents.
        tell: called with the number of documents done.
    """
    journal = Journal(folder / f"{split}.journal")
    facts, done = journal.read()
    if done:
        return facts
    try:
        return write_split(folder, split, read(), tokenizer, facts, journal, tell)
    except ChangedError:
        return write_split(folder, split, read(), tokenizer, EMPTY, journal, tell)


def write_split(
    folder: Path,
    split: str,
    documents: Iterator[str],
    tokenizer: Tokenizer,
    facts: SplitFacts,
    journal: "Journal",
    tell: Callable[[int], None],
) -> SplitFacts:
    """Go on writing after what `facts` tell of.

    Raises:
        ChangedError: if the documents up to there, or the files, are not those of `facts`.
    """
    dtype = id_type(len(tokenizer))
    batches = measured_batches(documents, facts)
    with (
        open(folder / f"{split}.ids", "ab") as ids_file,
        open(folder / f"{split}.offsets", "ab") as offsets_file,
        # One thread reads and measures the next batch while the tokenizer, which needs no GIL, encodes this one.
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        cut(ids_file, facts.num_tokens * np.dtype(dtype).itemsize)
        cut(offsets_file, (facts.num_documents + 1) * np.dtype(OFFSET_TYPE).itemsize if facts.num_documents else 0)
        if not facts.num_documents:
            offsets_file.write(np.zeros(1, OFFSET_TYPE).tobytes())
        coming = pool.submit(next, batches, None)
        flushed = facts
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            encoded = tokenizer.encode_documents(batch.documents)
            ends = facts.num_tokens + np.cumsum(list(map(len, encoded)), dtype=OFFSET_TYPE)
            ids_file.write(b"".join(np.array(ids, dtype=dtype).tobytes() for ids in encoded))
            offsets_file.write(ends.tobytes())
            facts = replace(batch.facts, num_tokens=int(ends[-1]))
            if facts.num_bytes - flushed.num_bytes >= JOURNAL_BYTES:
                flush(ids_file, offsets_file)
                journal.write(facts)
                flushed = facts
            tell(facts.num_documents)
        flush(ids_file, offsets_file)
    journal.write(facts, done=True)
    return facts


def measured_batches(documents: Iterator[str], before: SplitFacts) -> Iterator[Batch]:
    """The documents after those of `before`, in batches.

    Raises:
        ChangedError: if the text of those before is another one now.
    """
    digest = hashlib.sha256()
    for text in islice(documents, before.num_documents):
        digest.update(utf_8(text) + b"\0")
    if digest.hexdigest() != before.sha256:
        raise ChangedError
    num_documents, num_bytes, num_words = before.num_documents, before.num_bytes, before.num_words
    batch: list[str] = []
    batch_bytes = 0
    for text in documents:
        digest.update(utf_8(text) + b"\0")
        text_bytes, text_words = measure(text)
        batch.append(text)
        batch_bytes, num_words = batch_bytes + text_bytes, num_words + text_words
        if len(batch) == BATCH_DOCUMENTS or batch_bytes >= BATCH_BYTES:
            num_documents, num_bytes = num_documents + len(batch), num_bytes + batch_bytes
            yield Batch(batch, SplitFacts(num_documents, 0, num_bytes, num_words, digest.hexdigest()))
            batch, batch_bytes = [], 0
    if batch:
        num_documents, num_bytes = num_documents + len(batch), num_bytes + batch_bytes
        yield Batch(batch, SplitFacts(num_documents, 0, num_bytes, num_words, digest.hexdigest()))


def utf_8(text: str) -> bytes:
    """The bytes of `text`.

    Raises:
        LumiereError: if it holds half of a surrogate pair, which is no character.
    """
    try:
        return text.encode()
    except UnicodeError:
        raise not_a_character() from None


def measure(text: str) -> tuple[int, int]:
    """UTF-8 bytes, and words by white space with line ends counted."""
    return len(text.encode()), len(text.split()) + text.count("\n")


def cut(file: BinaryIO, size: int) -> None:
    """Drop what was written after the journal's last entry.

    Raises:
        ChangedError: if less was written than the journal says.
    """
    if os.fstat(file.fileno()).st_size < size:
        raise ChangedError
    file.truncate(size)


def flush(*files: IO[Any]) -> None:
    """Return when what was written is on the disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is the old one or the whole new one, also after a crash."""
    temporary = path.with_name(path.name + "-new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        flush(file)
    os.replace(temporary, path)


class Journal:
    """How far a split is encoded: its facts so far, written only when the files behind them are on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[SplitFacts, bool]:
        """The facts so far, and whether that is all of the split; `EMPTY` where nothing can be gone on from."""
        try:
            entry: Mapping[str, Any] = parse_json(read_file(self._path, MAX_JOURNAL_BYTES))
            facts, done = SplitFacts(**entry["facts"]), entry["done"] is True
        except (OSError, ValueError, TypeError, KeyError):
            return EMPTY, False
        return (facts, done) if facts.is_sound else (EMPTY, False)

    def write(self, facts: SplitFacts, done: bool = False) -> None:
        write_durably(self._path, json.dumps({"facts": asdict(facts), "done": done}))
