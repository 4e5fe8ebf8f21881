"""Encode documents into ids on disk, batch by batch; an interrupted pass resumes where it stopped, even in a document.

A split becomes two growing files, `train.ids` and `train.offsets`, and a journal of how much of them is complete. One
file of any size can be memory-mapped as well as many small ones, and is easier to address.
"""

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter

from lumiere.data.checksums import write_json
from lumiere.data.text import Part
from lumiere.data.tokenizer import Tokenizer, not_a_character
from lumiere.files import read_file

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
            Caches of versions that did not count them have 0.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    num_documents: NonNegativeInt
    num_tokens: PositiveInt
    num_bytes: PositiveInt
    num_words: PositiveInt
    sha256: str
    num_normalized_bytes: NonNegativeInt = 0

    @property
    def num_targets(self) -> int:
        """Tokens to predict, each counted once: all but the first of each document."""
        return self.num_tokens - self.num_documents


@dataclass(frozen=True)
class State:
    """How much of a split is encoded. The facts include the unfinished last document, except in `num_documents`.

    Attributes:
        num_parts: Number of encoded parts of documents.
        is_within: Whether the last of them does not end its document.
        done: Whether the split is complete.
    """

    __pydantic_config__ = ConfigDict(strict=True)

    facts: SplitFacts
    num_parts: NonNegativeInt
    is_within: bool
    done: bool = False


EMPTY = State(SplitFacts(0, 0, 0, 0, hashlib.sha256().hexdigest()), 0, False)
FACTS, JOURNAL = TypeAdapter(dict[str, SplitFacts]), TypeAdapter(State)


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
    journal = folder / f"{split}.journal"
    state = read_journal(journal)
    if state.done:
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
    before: State,
    journal: Path,
    emit: Callable[[SplitFacts], None],
) -> SplitFacts:
    """Resume writing after `before`.

    Raises:
        ChangedError: The documents up to there, or the files, are not those of `before`.
    """
    state, flushed = before, before.facts
    with (
        open(folder / f"{split}.ids", "ab") as ids_file,
        open(folder / f"{split}.offsets", "ab") as offsets_file,
        closing(encoded_batches(parts, tokenizer, before)) as batches,
    ):
        num_offsets = before.facts.num_documents + 1 if before.num_parts else 0
        truncate(ids_file, before.facts.num_tokens * np.dtype(id_type(len(tokenizer))).itemsize)
        truncate(offsets_file, num_offsets * np.dtype(OFFSET_TYPE).itemsize)
        if not num_offsets:
            offsets_file.write(np.zeros(1, OFFSET_TYPE).tobytes())
        for ids, ends, after in batches:
            ids_file.write(ids.tobytes())
            offsets_file.write(ends.tobytes())
            state = after
            if state.facts.num_bytes - flushed.num_bytes >= JOURNAL_BYTES:
                flush(ids_file, offsets_file)
                write_journal(journal, state)
                flushed = state.facts
            emit(state.facts)
        flush(ids_file, offsets_file)
    write_journal(journal, replace(state, done=True))
    return state.facts


def encoded_batches(
    parts: Iterator[Part], tokenizer: Tokenizer, before: State = EMPTY
) -> Generator[tuple[np.ndarray, np.ndarray, State], None, None]:
    """Encode the parts of documents after those of `before`, batch by batch.

    Yields:
        ids: (num_tokens,), all parts of the batch concatenated.
        ends: (num_documents,) int64, where each document that ends in the batch ends among the ids of the split.
        state: The state after the batch.

    Raises:
        ChangedError: The text of the parts before differs from what `before` describes.
        LumiereError: A text contains half of a surrogate pair.
    """
    sizes = np.array(tokenizer.token_sizes)
    state, batches = before, measured_batches(parts if tokenizer.splits_text else whole_documents(parts), before)
    # A thread reads the next batch while the tokenizer, which releases the GIL, encodes this one.
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            batch_parts, measured = batch
            ids, ends = encode_parts(batch_parts, state.is_within, tokenizer)
            num_tokens = state.facts.num_tokens + len(ids)
            num_normalized = state.facts.num_normalized_bytes + int(sizes[ids].sum())
            ends = state.facts.num_tokens + ends[[part.is_last for part in batch_parts]]
            facts = replace(measured.facts, num_tokens=num_tokens, num_normalized_bytes=num_normalized)
            state = replace(measured, facts=facts)
            yield ids, ends, state


def whole_documents(parts: Iterable[Part]) -> Iterator[Part]:
    """Join the parts of each document."""
    held: list[str] = []
    for text, is_last in parts:
        held.append(text)
        if is_last:
            yield Part("".join(held), is_last=True)
            held = []


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
        if not is_within and tokenizer.start_id is not None:
            ids.insert(0, tokenizer.start_id)
        if part.is_last:
            ids.extend(tokenizer.end_ids[:1])
        is_within = not part.is_last
    dtype = id_type(len(tokenizer))
    joined = np.concatenate([np.array(ids, dtype=dtype) for ids in encoded])
    return joined, np.cumsum(list(map(len, encoded)), dtype=OFFSET_TYPE)


def measured_batches(parts: Iterator[Part], state: State) -> Iterator[tuple[list[Part], State]]:
    """Yield the parts after those of `state` in batches, each with the state after it, except for its tokens.

    Raises:
        ChangedError, LumiereError: As `encoded_batches`.
    """
    digest = hashlib.sha256()

    def update(part: Part) -> None:
        try:
            digest.update(part.text.encode() + b"\0" * part.is_last)
        except UnicodeError:
            raise not_a_character() from None

    for part in islice(parts, state.num_parts):
        update(part)
    if digest.hexdigest() != state.facts.sha256:
        raise ChangedError
    facts, num_parts, batch = state.facts, state.num_parts, []
    num_documents, num_bytes, num_words = facts.num_documents, facts.num_bytes, facts.num_words

    def measured() -> tuple[list[Part], State]:
        facts = SplitFacts(num_documents, 0, num_bytes, num_words, digest.hexdigest())
        return batch, State(facts, num_parts, not batch[-1].is_last)

    end = num_bytes + BATCH_BYTES
    for part in parts:
        update(part)
        batch.append(part)
        part_bytes, part_words = measure(part.text)
        num_parts, num_documents = num_parts + 1, num_documents + part.is_last
        num_bytes, num_words = num_bytes + part_bytes, num_words + part_words
        if len(batch) == BATCH_PARTS or num_bytes >= end:
            yield measured()
            batch, end = [], num_bytes + BATCH_BYTES
    if batch:
        yield measured()


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


def read_journal(path: Path) -> State:
    """Return how much of a split is encoded; `EMPTY` if there is nothing to resume."""
    try:
        return JOURNAL.validate_json(read_file(path, MAX_JOURNAL_BYTES))
    except (OSError, ValueError):
        return EMPTY


def write_journal(path: Path, state: State) -> None:
    """Record how much of a split is encoded, after the files it describes are on disk."""
    write_json(path, asdict(state))
