"""Documents into ids on disk, batch by batch; an encoding that was stopped goes on where it was, also in a document.

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

from lumiere.data.text import Part
from lumiere.data.tokenizer import EOT, SOT, Tokenizer, not_a_character
from lumiere.files import parse_json, read_file

BATCH_BYTES = 4_000_000
"""Text encoded in one call: enough to keep all cores busy, little enough to hold its ids beside it."""
BATCH_PARTS = 1024
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
        num_normalized_bytes: UTF-8 bytes after the tokenizer's normalizer, which are those that its tokens stand for.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_words: int
    sha256: str
    num_normalized_bytes: int

    @property
    def num_targets(self) -> int:
        """Tokens that a model predicts, each counted once: all but each document's first."""
        return self.num_tokens - self.num_documents

    @property
    def is_sound(self) -> bool:
        """Whether these are facts at all: of a file that anybody may have written, they are what stood there."""
        counts = (self.num_documents, self.num_tokens, self.num_bytes, self.num_words, self.num_normalized_bytes)
        return all(isinstance(count, int) and count > 0 for count in counts) and isinstance(self.sha256, str)


@dataclass(frozen=True)
class State:
    """How far a split is encoded. Tokens, bytes and words of a document that has not ended are among the facts.

    Attributes:
        num_parts: parts of documents that are done.
        is_within: whether the last of them ended no document.
    """

    facts: SplitFacts
    num_parts: int
    is_within: bool

    @property
    def is_sound(self) -> bool:
        """Whether this is a state at all; in the first document, none has ended."""
        facts = replace(self.facts, num_documents=self.facts.num_documents + 1)
        counts = (self.num_parts, self.facts.num_documents)
        return facts.is_sound and all(isinstance(count, int) and count >= 0 for count in counts)


EMPTY = State(SplitFacts(0, 0, 0, 0, hashlib.sha256().hexdigest(), 0), 0, False)


@dataclass(frozen=True)
class Batch:
    """Parts to be encoded together, and the state after them, but for what the tokens tell."""

    parts: Sequence[Part]
    state: State


class ChangedError(Exception):
    """What was encoded before is not what comes now, or not what is on the disk."""


def id_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_split(
    folder: Path,
    split: str,
    read: Callable[[], Iterator[Part]],
    tokenizer: Tokenizer,
    tell: Callable[[SplitFacts], None],
) -> SplitFacts:
    """Write the ids and offsets of a split into `folder`, or what is missing of them.

    The result is the same, byte for byte, however often it was stopped on the way.

    Args:
        read: starts to read its documents.
        tell: called with the facts so far.
    """
    journal = Journal(folder / f"{split}.journal")
    state, done = journal.read()
    if done:
        return state.facts
    try:
        return write_split(folder, split, read(), tokenizer, state, journal, tell)
    except ChangedError:
        return write_split(folder, split, read(), tokenizer, EMPTY, journal, tell)


def write_split(
    folder: Path,
    split: str,
    parts: Iterator[Part],
    tokenizer: Tokenizer,
    state: State,
    journal: "Journal",
    tell: Callable[[SplitFacts], None],
) -> SplitFacts:
    """Go on writing after `state`.

    Raises:
        ChangedError: if the documents up to there, or the files, are not those of `state`.
    """
    dtype = id_type(len(tokenizer))
    sizes = np.array(tokenizer.token_sizes)
    batches = measured_batches(parts, state)
    facts = flushed = state.facts
    with (
        open(folder / f"{split}.ids", "ab") as ids_file,
        open(folder / f"{split}.offsets", "ab") as offsets_file,
        # One thread reads and measures the next batch while the tokenizer, which needs no GIL, encodes this one.
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        cut(ids_file, facts.num_tokens * np.dtype(dtype).itemsize)
        cut(offsets_file, (facts.num_documents + 1) * np.dtype(OFFSET_TYPE).itemsize if state.num_parts else 0)
        if not state.num_parts:
            offsets_file.write(np.zeros(1, OFFSET_TYPE).tobytes())
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            encoded = encode_parts(batch.parts, state.is_within, tokenizer)
            ends = facts.num_tokens + np.cumsum(list(map(len, encoded)), dtype=OFFSET_TYPE)
            is_last = np.array([part.is_last for part in batch.parts])
            ids = np.concatenate([np.array(ids, dtype=dtype) for ids in encoded])
            ids_file.write(ids.tobytes())
            offsets_file.write(ends[is_last].tobytes())
            num_normalized = facts.num_normalized_bytes + int(sizes[ids].sum())
            facts = replace(batch.state.facts, num_tokens=int(ends[-1]), num_normalized_bytes=num_normalized)
            state = replace(batch.state, facts=facts)
            if facts.num_bytes - flushed.num_bytes >= JOURNAL_BYTES:
                flush(ids_file, offsets_file)
                journal.write(state)
                flushed = facts
            tell(facts)
        flush(ids_file, offsets_file)
    journal.write(state, done=True)
    return facts


def encode_parts(parts: Sequence[Part], is_within: bool, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of each part, with the tokens that mark the start and the end of a document.

    Args:
        is_within: whether the first of them goes on with a document.
    """
    encoded = tokenizer.encode_batch([part.text for part in parts])
    for part, ids in zip(parts, encoded, strict=True):
        if not is_within:
            ids.insert(0, SOT)
        if part.is_last:
            ids.append(EOT)
        is_within = not part.is_last
    return encoded


def measured_batches(parts: Iterator[Part], before: State) -> Iterator[Batch]:
    """The parts after those of `before`, in batches.

    Raises:
        ChangedError: if the text of those before is another one now.
    """
    digest = hashlib.sha256()

    def take_in(part: Part) -> None:
        digest.update(utf_8(part.text) + (b"\0" if part.is_last else b""))

    for part in islice(parts, before.num_parts):
        take_in(part)
    if digest.hexdigest() != before.facts.sha256:
        raise ChangedError
    state = before
    batch: list[Part] = []
    batch_bytes = batch_words = 0

    def whole() -> Batch:
        facts = replace(
            state.facts,
            num_documents=state.facts.num_documents + sum(part.is_last for part in batch),
            num_bytes=state.facts.num_bytes + batch_bytes,
            num_words=state.facts.num_words + batch_words,
            sha256=digest.hexdigest(),
        )
        return Batch(batch, State(facts, state.num_parts + len(batch), not batch[-1].is_last))

    for part in parts:
        take_in(part)
        part_bytes, part_words = measure(part.text)
        batch.append(part)
        batch_bytes, batch_words = batch_bytes + part_bytes, batch_words + part_words
        if len(batch) == BATCH_PARTS or batch_bytes >= BATCH_BYTES:
            yield (done := whole())
            state, batch, batch_bytes, batch_words = done.state, [], 0, 0
    if batch:
        yield whole()


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
    """How far a split is encoded, written only when the files behind it are on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[State, bool]:
        """The state, and whether that is all of the split; `EMPTY` where nothing can be gone on from."""
        try:
            entry: Mapping[str, Any] = parse_json(read_file(self._path, MAX_JOURNAL_BYTES))
            state = State(SplitFacts(**entry["facts"]), entry["num_parts"], entry["is_within"] is True)
            return (state, entry["done"] is True) if state.is_sound else (EMPTY, False)
        except (OSError, ValueError, TypeError, KeyError):
            return EMPTY, False

    def write(self, state: State, done: bool = False) -> None:
        write_durably(self._path, json.dumps(asdict(state) | {"done": done}))
