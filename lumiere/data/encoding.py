"""Encode documents into ids on disk, batch by batch; an interrupted pass resumes where it stopped, even in a document.

A split becomes two growing files, `train.ids` and `train.offsets`, and a journal of how much of them is complete. One
file of any size can be memory-mapped as well as many small ones, and is easier to address.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from lumiere.data.checksums import write_json
from lumiere.data.text import Part
from lumiere.data.tokenizer import EOT, SOT, Tokenizer, not_a_character
from lumiere.files import parse_json, read_file

BATCH_BYTES = 4_000_000
"""Text encoded in one call: enough to keep all cores busy, while its ids still fit in memory beside it."""
BATCH_PARTS = 1024
JOURNAL_BYTES = 64_000_000
"""Text between journal entries, hence the most that is encoded twice after an interruption."""
MAX_JOURNAL_BYTES = 10_000
OFFSET_TYPE = np.int64


@dataclass(frozen=True)
class SplitFacts:
    """Size and identity of the text of a split.

    Attributes:
        num_bytes: UTF-8 bytes of its documents, before normalization.
        num_words: White-space separated words, line ends counted as words.
        sha256: Hash of its documents.
        num_normalized_bytes: UTF-8 bytes after the tokenizer's normalizer, which are the bytes that its tokens spell.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_words: int
    sha256: str
    num_normalized_bytes: int

    @property
    def num_targets(self) -> int:
        """Tokens to predict, each counted once: all but the first of each document."""
        return self.num_tokens - self.num_documents

    @property
    def is_valid(self) -> bool:
        """Whether the values have the right types and signs; they may come from a damaged file."""
        counts = (self.num_documents, self.num_tokens, self.num_bytes, self.num_words, self.num_normalized_bytes)
        return all(isinstance(count, int) and count > 0 for count in counts) and isinstance(self.sha256, str)


@dataclass(frozen=True)
class State:
    """How much of a split is encoded. The facts include the unfinished last document, except in `num_documents`.

    Attributes:
        num_parts: Number of encoded parts of documents.
        is_within: Whether the last of them does not end its document.
    """

    facts: SplitFacts
    num_parts: int
    is_within: bool

    @property
    def is_valid(self) -> bool:
        """Whether the values have the right types and signs; within the first document, `num_documents` is 0."""
        facts = replace(self.facts, num_documents=self.facts.num_documents + 1)
        counts = (self.num_parts, self.facts.num_documents)
        return facts.is_valid and all(isinstance(count, int) and count >= 0 for count in counts)


EMPTY = State(SplitFacts(0, 0, 0, 0, hashlib.sha256().hexdigest(), 0), 0, False)


@dataclass(frozen=True)
class Batch:
    """Parts to encode together, and the state after them, except for what depends on their tokens."""

    parts: Sequence[Part]
    state: State


class ChangedError(Exception):
    """The documents or files are not those that were encoded before."""


def id_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Return the smallest integer type that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_split(
    folder: Path,
    split: str,
    read: Callable[[], Iterator[Part]],
    tokenizer: Tokenizer,
    emit: Callable[[SplitFacts], None],
) -> SplitFacts:
    """Write the ids and offsets of a split into `folder`, or the rest of them after an interruption.

    The result is the same, byte for byte, however often it was interrupted.

    Args:
        read: Starts reading the documents.
        emit: Called with the facts so far, after each batch.
    """
    journal = Journal(folder / f"{split}.journal")
    state, done = journal.read()
    if done:
        return state.facts
    try:
        return write_split(folder, split, read(), tokenizer, state, journal, emit)
    except ChangedError:
        return write_split(folder, split, read(), tokenizer, EMPTY, journal, emit)


def write_split(
    folder: Path,
    split: str,
    parts: Iterator[Part],
    tokenizer: Tokenizer,
    state: State,
    journal: "Journal",
    emit: Callable[[SplitFacts], None],
) -> SplitFacts:
    """Resume writing after `state`.

    Raises:
        ChangedError: The documents up to there, or the files, are not those of `state`.
    """
    dtype = id_type(len(tokenizer))
    sizes = np.array(tokenizer.token_sizes)
    batches = measured_batches(parts, state)
    facts = flushed = state.facts
    with (
        open(folder / f"{split}.ids", "ab") as ids_file,
        open(folder / f"{split}.offsets", "ab") as offsets_file,
        # A thread reads the next batch while the tokenizer, which releases the GIL, encodes this one.
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        truncate(ids_file, facts.num_tokens * np.dtype(dtype).itemsize)
        truncate(offsets_file, (facts.num_documents + 1) * np.dtype(OFFSET_TYPE).itemsize if state.num_parts else 0)
        if not state.num_parts:
            offsets_file.write(np.zeros(1, OFFSET_TYPE).tobytes())
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            ids, ends = encode_parts(batch.parts, state.is_within, tokenizer)
            ends += facts.num_tokens
            ids_file.write(ids.tobytes())
            offsets_file.write(ends[[part.is_last for part in batch.parts]].tobytes())
            num_normalized = facts.num_normalized_bytes + int(sizes[ids].sum())
            facts = replace(batch.state.facts, num_tokens=int(ends[-1]), num_normalized_bytes=num_normalized)
            state = replace(batch.state, facts=facts)
            if facts.num_bytes - flushed.num_bytes >= JOURNAL_BYTES:
                flush(ids_file, offsets_file)
                journal.write(state)
                flushed = facts
            emit(facts)
        flush(ids_file, offsets_file)
    journal.write(state, done=True)
    return facts


def encode_parts(parts: Sequence[Part], is_within: bool, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Encode parts of documents, with the tokens that mark the start and end of a document.

    Args:
        is_within: Whether the first part continues a document.

    Returns:
        ids: (num_tokens,), all parts concatenated.
        ends: (num_parts,) int64, where each part ends in `ids`.
    """
    encoded = tokenizer.encode_batch([part.text for part in parts])
    for part, ids in zip(parts, encoded, strict=True):
        if not is_within:
            ids.insert(0, SOT)
        if part.is_last:
            ids.append(EOT)
        is_within = not part.is_last
    dtype = id_type(len(tokenizer))
    joined = np.concatenate([np.array(ids, dtype=dtype) for ids in encoded])
    return joined, np.cumsum(list(map(len, encoded)), dtype=OFFSET_TYPE)


def measured_batches(parts: Iterator[Part], before: State) -> Iterator[Batch]:
    """Yield the parts after those of `before` in batches.

    Raises:
        ChangedError: The text of the parts before differs from what `before` describes.
        LumiereError: A text contains half of a surrogate pair.
    """
    digest = hashlib.sha256()

    def update(part: Part) -> None:
        try:
            digest.update(part.text.encode() + b"\0" * part.is_last)
        except UnicodeError:
            raise not_a_character() from None

    for part in islice(parts, before.num_parts):
        update(part)
    if digest.hexdigest() != before.facts.sha256:
        raise ChangedError
    state, batch = before, []
    num_bytes = num_words = 0

    def complete() -> Batch:
        facts = replace(
            state.facts,
            num_documents=state.facts.num_documents + sum(part.is_last for part in batch),
            num_bytes=state.facts.num_bytes + num_bytes,
            num_words=state.facts.num_words + num_words,
            sha256=digest.hexdigest(),
        )
        return Batch(batch, State(facts, state.num_parts + len(batch), not batch[-1].is_last))

    for part in parts:
        update(part)
        part_bytes, part_words = measure(part.text)
        batch.append(part)
        num_bytes, num_words = num_bytes + part_bytes, num_words + part_words
        if len(batch) == BATCH_PARTS or num_bytes >= BATCH_BYTES:
            yield (done := complete())
            state, batch, num_bytes, num_words = done.state, [], 0, 0
    if batch:
        yield complete()


def measure(text: str) -> tuple[int, int]:
    """Return the number of UTF-8 bytes, and of white-space separated words with line ends counted as words."""
    return len(text.encode()), len(text.split()) + text.count("\n")


def truncate(file: BinaryIO, size: int) -> None:
    """Drop what was written after the last journal entry.

    Raises:
        ChangedError: The file is shorter than the journal says.
    """
    if os.fstat(file.fileno()).st_size < size:
        raise ChangedError
    file.truncate(size)


def flush(*files: IO[Any]) -> None:
    """Return when everything written is on disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())


class Journal:
    """How much of a split is encoded. Written only after the files it describes are on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[State, bool]:
        """Return the state, and whether the split is complete; `EMPTY` if there is nothing to resume."""
        try:
            entry: Mapping[str, Any] = parse_json(read_file(self._path, MAX_JOURNAL_BYTES))
            state = State(SplitFacts(**entry["facts"]), entry["num_parts"], entry["is_within"] is True)
            return (state, entry["done"] is True) if state.is_valid else (EMPTY, False)
        except (OSError, ValueError, TypeError, KeyError):
            return EMPTY, False

    def write(self, state: State, done: bool = False) -> None:
        write_json(self._path, asdict(state) | {"done": done})
