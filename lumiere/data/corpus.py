"""Documents by split: built-in corpora, plain text files, tables, or anything that `datasets` reads."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, groupby, islice, tee
from operator import itemgetter
from typing import Any, TextIO, cast

from lumiere.config.schema import DatasetConfig
from lumiere.data.chains import CHAINS_VERSION, chains
from lumiere.data.sources import (
    BUILDERS,
    ENDINGS,
    SPLIT_NAMES,
    SPLITS,
    Source,
    absolute_data_files,
    ending,
    has_subsets,
    local,
    plain_folder,
    resolve_data_files,
)
from lumiere.data.stories import STORIES_VERSION, stories
from lumiere.data.tables import arrow_rows, csv_rows, json_rows
from lumiere.data.text import Part, blocks, lines, parts
from lumiere.errors import DataError, shortened

DEFAULT_NUM_DOCUMENTS = 20_000
"""Training documents of a built-in corpus."""
MANY_DOCUMENTS = 1_000_000
"""Beyond this number, the documents held out are drawn one by one instead of listed."""

BUILT_IN: Mapping[str, tuple[Callable[[str, int, int], Iterator[str]], int]] = {
    "stories": (stories, STORIES_VERSION),
    "chains": (chains, CHAINS_VERSION),
}
"""Generator of the documents of a split, and its version, by name."""

ROWS_AT_ONCE = 256
"""Rows sent to the `document_start` matcher in one batch."""
SECONDS = 5
"""Time limit of the matcher per batch, which takes microseconds unless a pattern backtracks exponentially."""
MATCHER = """
import faulthandler, json, os, re, signal, sys, warnings
signal.signal(signal.SIGINT, signal.SIG_IGN)
warnings.simplefilter("ignore")
pattern, seconds = json.loads(sys.stdin.readline())
pattern, nowhere = re.compile(pattern), open(os.devnull, "w")
for line in sys.stdin:
    # Its timer is a thread that does not need the interpreter's lock.
    faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
    found = [pattern.search(row) is not None for row in json.loads(line)]
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(found), flush=True)
"""
SPACE = re.compile(r"\s")

Reader = Callable[[], Iterator[Part]]


@dataclass(frozen=True)
class Corpus:
    """Documents by split. Each split can be read any number of times.

    Attributes:
        readers: For each split, a function that starts reading its documents, in parts.
        fingerprint: Changes whenever the documents may have changed; computed from the source without reading rows.
        counts: Documents per split, where known without reading them.
        unused: Splits of the dataset that match none of ours.
        rows: Row counters of the splits whose documents are the rows of a table.
        missing: Why the documents cannot be read, although their fingerprint is known.
    """

    readers: Mapping[str, Reader]
    fingerprint: str
    counts: Mapping[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    rows: Mapping[str, "CountedRows"] = field(default_factory=dict)
    missing: DataError | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.readers)

    def parts(self, split: str) -> Iterator[Part]:
        """Read the documents in parts, a few of which are in memory at a time."""
        return self.readers[split]()

    def documents(self, split: str) -> Iterator[str]:
        """Read whole documents one by one."""
        return joined(self.parts(split))


@dataclass
class CountedRows:
    """Rows, with the number of all and of blank rows in the last pass."""

    rows: Iterable[str]
    num_rows: int = 0
    num_empty: int = 0

    def __iter__(self) -> Iterator[str]:
        self.num_rows = self.num_empty = 0
        for row in self.rows:
            self.num_rows += 1
            self.num_empty += not row.strip()
            yield row


@dataclass(frozen=True)
class FileRows:
    """One column of files, read again at each iteration and never held in memory."""

    source: Source
    split: str
    column: str

    def __iter__(self) -> Iterator[str]:
        paths = self.source.files[self.split]
        match self.source.builder:
            case "csv":
                return csv_rows(paths, self.column, self.source.separator)
            case "json":
                return json_rows(paths, self.column)
            case kind:
                return arrow_rows(paths, self.column, kind)


@dataclass(frozen=True)
class TextFiles:
    """Plain text files. Iterating yields their lines; `parts` reads each file as a document."""

    paths: Sequence[str]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(map(lines, self.paths))

    def parts(self) -> Iterator[Part]:
        return chain.from_iterable(parts(blocks(path)) for path in self.paths)


def load_corpus(config: DatasetConfig) -> Corpus:
    """Open the corpus that `config` names.

    Raises:
        DataError: It does not exist, cannot be reached, or lacks the subset, the text column or a training split.
    """
    if config.name in BUILT_IN:
        return built_in_corpus(config)
    try:
        rows, source = load_rows(config)
        if config.data_sha256 not in (None, source):
            raise DataError(
                f"the files of dataset '{config.name}' do not match dataset.data_sha256",
                "restore them, or accept them as they are with --set dataset.data_sha256=null",
            )
    except DataError as error:
        if config.data_sha256 is None:
            raise
        # The corpus may still be in the cache, which needs only the hash of the files; fail only when they are read.
        readers = {split: failing(error) for split in SPLITS}
        return Corpus(readers, fingerprint_of(config.data_sha256, config), missing=error)
    named, unused = match_splits(rows)
    if "train" not in named:
        raise DataError(
            f"dataset '{config.name}' has no split 'train', it has {', '.join(rows)}", "choose another dataset"
        )
    is_text = any(isinstance(rows[name], TextFiles) for name in named.values())
    # Only rows of a table are documents that can be missing: blank lines of a text are not.
    are_counted = config.document_start is None and not is_text
    counted = {split: CountedRows(rows[name]) for split, name in named.items()} if are_counted else {}
    readers = {
        split: row_reader(counted.get(split, rows[name]), config.document_start) for split, name in named.items()
    }
    if config.num_documents is not None:
        readers["train"] = take(readers["train"], config.num_documents)
    if "validation" not in readers:
        # Files can be read twice even if they are streamed.
        is_stream = config.streaming and not isinstance(rows[named["train"]], TextFiles)
        split = split_validation_of_stream if is_stream else split_validation
        readers |= split(readers["train"], config.validation_fraction, config.seed)
    ordered = {split: readers[split] for split in SPLITS if split in readers}
    return Corpus(ordered, fingerprint_of(source, config), unused=unused, rows=counted)


def find_source(config: DatasetConfig) -> Source:
    """Return the source that the config names, without reading any rows.

    Raises:
        DataError: It does not exist, cannot be reached, or has no format that Lumiere reads.
    """
    if config.name in BUILDERS:
        if not config.data_files:
            raise DataError(f"dataset '{config.name}' needs dataset.data_files", "--set dataset.data_files=book.txt")
        return Source(config.name, resolve_data_files(config.data_files, ENDINGS[config.name]))
    path = os.path.expanduser(config.name)
    if os.path.isfile(path):
        builder = next((name for name, endings in ENDINGS.items() if ending(path) in endings), "text")
        raise DataError(
            f"dataset '{config.name}' is a file, not a folder",
            f"--set dataset.name={builder} --set dataset.data_files={config.name}",
        )
    is_folder = os.path.isdir(path)
    if is_folder and not config.data_files and not has_subsets(path):
        return plain_folder(config, local(path))
    if not is_folder and (config.name.startswith((".", "~")) or os.path.isabs(path)):
        raise DataError(f"there is no dataset folder '{config.name}'", "check dataset.name")
    from lumiere.data.hub import described_folder, hub_source

    return described_folder(config, local(path)) if is_folder else hub_source(config)


def load_rows(config: DatasetConfig) -> tuple[dict[str, Iterable[str]], str]:
    """Return the rows of each split, and the identity of their source.

    Raises:
        DataError: The dataset does not exist, cannot be reached, needs a builder that may run code, or lacks the subset
            or the text column.
    """
    source = find_source(config)
    if source.builder == "text":
        return {split: TextFiles(paths) for split, paths in source.files.items()}, source.identity()
    rows: dict[str, Iterable[str]] = {split: FileRows(source, split, config.text_column) for split in source.files}
    for split in rows:
        next(iter(rows[split]), None)  # report a missing column before anything is built
    return rows, source.identity()


def recorded(config: DatasetConfig) -> DatasetConfig:
    """Return `config` as a run records it: with absolute paths, and the hash of the local files that it names.

    Raises:
        DataError: A file is missing or cannot be read.
    """
    is_local = config.name in BUILDERS or os.path.isdir(os.path.expanduser(config.name))
    if config.name in BUILT_IN or config.data_sha256 is not None or not is_local:
        return config
    values: dict[str, Any] = {"data_sha256": find_source(config).identity()}
    if config.name in BUILDERS:
        values["data_files"] = absolute_data_files(config.data_files or [])
    else:
        values["name"] = local(config.name)
    return config.model_copy(update=values)


def fingerprint_of(source: str, config: DatasetConfig) -> str:
    """Return the fingerprint of the documents that `config` makes of the rows of a source."""
    keys = {"text_column", "document_start", "num_documents", "validation_fraction", "seed"}
    return hashlib.sha256(json.dumps([source, config.model_dump(include=keys)], sort_keys=True).encode()).hexdigest()


def failing(error: DataError) -> Reader:
    """Return a reader that raises `error`."""

    def read() -> Iterator[Part]:
        raise error

    return read


def match_splits(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return which splits of a dataset are our train, validation and test split, and which are unused.

    An exact name takes precedence over the other common ones (`SPLIT_NAMES`), in their order.
    """
    names = list(names)
    ranks = {name: rank for rank, name in enumerate(SPLIT_NAMES)}
    chosen: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (name not in SPLITS, ranks.get(name.strip().lower(), len(ranks)))):
        if split := SPLIT_NAMES.get(name.strip().lower()):
            chosen.setdefault(split, name)
    return chosen, tuple(name for name in names if name not in chosen.values())


def built_in_corpus(config: DatasetConfig) -> Corpus:
    """Return a generated corpus, whose validation and test splits have `validation_fraction` of the training size."""
    generate, version = BUILT_IN[config.name]
    num_train = config.num_documents or DEFAULT_NUM_DOCUMENTS
    num_held_out = max(1, round(num_train * config.validation_fraction))
    counts = {"train": num_train, "validation": num_held_out, "test": num_held_out}
    readers: dict[str, Reader] = {
        split: lambda split=split, count=count: (Part(text, True) for text in generate(split, count, config.seed))
        for split, count in counts.items()
    }
    identity = f"{config.name} {version} {config.seed} {counts}"
    return Corpus(readers, hashlib.sha256(identity.encode()).hexdigest(), counts)


# From rows to documents


def row_reader(rows: Iterable[str], document_start: str | None) -> Reader:
    """Return a reader of documents: each row, or each file of plain text.

    With `document_start`, a document starts at each matching row, or line (`grouped_parts`).
    """
    if document_start is not None:
        return lambda: grouped_parts(rows, document_start)
    if isinstance(rows, TextFiles):
        return rows.parts
    return lambda: chain.from_iterable(parts([row]) for row in rows)


def grouped_parts(rows: Iterable[str], document_start: str) -> Iterator[Part]:
    """Group rows into documents.

    A document starts at each row that, stripped, matches the pattern and stands alone: between blank rows or at the
    edge of the corpus. A line such as ` = 1 = ` within a paragraph is therefore no heading. Blank rows are dropped, the
    others joined unchanged.
    """
    for _, document in groupby(numbered_rows(rows, document_start), key=itemgetter(0)):
        yield from parts(row for _, row in document)


def numbered_rows(rows: Iterable[str], document_start: str) -> Iterator[tuple[int, str]]:
    """Yield each row that is not blank with the number of its document."""
    number, near = 0, neighbors(rows)
    with matcher(document_start) as find:
        while batch := list(islice(near, ROWS_AT_ONCE)):
            alone = [not before.strip() and bool(row.strip()) and not after.strip() for before, row, after in batch]
            found = iter(find([row.strip() for (_, row, _), is_alone in zip(batch, alone, strict=True) if is_alone]))
            for (_, row, _), is_alone in zip(batch, alone, strict=True):
                number += is_alone and next(found)
                if row.strip():
                    yield number, row


def neighbors(rows: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield each row between the row before it and the row after it, which are empty beyond the edges."""
    before, row, after = tee(chain([""], rows, [""]), 3)
    return zip(before, islice(row, 1, None), islice(after, 2, None), strict=False)


@contextmanager
def matcher(pattern: str) -> Iterator[Callable[[Sequence[str]], list[bool]]]:
    """Search rows for a pattern in a child process that is killed if it takes too long.

    A pattern such as `(a+)+$` takes time exponential in the length of a row, and nothing in this process could
    interrupt it.

    Yields:
        A function that returns for each row whether the pattern is found in it, or raises a `DataError` if it takes too
        long.
    """
    command, pipe = [sys.executable, "-I", "-S", "-c", MATCHER], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    # On exit, closes the pipe and waits.
    with suppress(BrokenPipeError), process as child:
        requests, answers = cast("TextIO", child.stdin), cast("TextIO", child.stdout)

        def find(rows: Sequence[str]) -> list[bool]:
            with suppress(BrokenPipeError):  # reading the answer then reports the timeout
                requests.write(json.dumps(rows) + "\n")
                requests.flush()
            if line := answers.readline():
                return json.loads(line)
            raise DataError(
                f"dataset.document_start '{shortened(pattern, 60)}' takes more than {SECONDS} seconds on a line",
                "rewrite it without nested repetition such as (a+)+",
            )

        requests.write(json.dumps([pattern, SECONDS]) + "\n")
        yield find


def joined(parts: Iterable[Part]) -> Iterator[str]:
    """Yield whole documents."""
    for _, document in groupby(numbered_parts(parts), key=itemgetter(0)):
        yield "".join(part.text for _, part in document)


def numbered_parts(parts: Iterable[Part]) -> Iterator[tuple[int, Part]]:
    """Yield each part with the number of its document."""
    number = 0
    for part in parts:
        yield number, part
        number += part.is_last


# Choosing documents


def take(reader: Reader, count: int) -> Reader:
    """Return a reader of the first `count` documents."""

    def read() -> Iterator[Part]:
        for number, part in numbered_parts(reader()):
            yield part
            if part.is_last and number + 1 == count:
                return

    return read


def split_documents(reader: Reader, is_held_out: Callable[[int], bool]) -> dict[str, Reader]:
    """Split documents into training and validation by their number."""

    def select(held_out: bool) -> Reader:
        return lambda: (part for number, part in numbered_parts(reader()) if is_held_out(number) == held_out)

    return {"train": select(False), "validation": select(True)}


def split_validation(reader: Reader, fraction: float, seed: int) -> dict[str, Reader]:
    """Split one reader into training and validation.

    Draws documents at random, because corpora are often sorted; splits the tail off a single document. Counts the
    documents when one of the two is first read.
    """

    @cache
    def readers() -> dict[str, Reader]:
        count = sum(part.is_last for part in reader())
        if count > MANY_DOCUMENTS:
            return split_validation_of_stream(reader, fraction, seed)
        if count == 1:
            return split_tail(reader, fraction)
        num_chosen = max(0, min(count - 1, max(1, round(count * fraction))))
        held_out = frozenset(random.Random(seed).sample(range(count), num_chosen))
        return split_documents(reader, held_out.__contains__)

    return {"train": lambda: readers()["train"](), "validation": lambda: readers()["validation"]()}


def split_validation_of_stream(reader: Reader, fraction: float, seed: int) -> dict[str, Reader]:
    """Split documents that cannot be counted first, or are too many to list those that are held out.

    Draws each document independently, by a hash of its number. The first is always kept and the second always held out.
    """

    def is_held_out(index: int) -> bool:
        digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
        return index == 1 or (index > 1 and int.from_bytes(digest, "little") < fraction * 2**64)

    return split_documents(reader, is_held_out)


def split_tail(reader: Reader, fraction: float) -> dict[str, Reader]:
    """Split a single document: the last `fraction` of its characters, from a space on, is for validation."""
    length = end = 0  # with and without trailing white space
    for text, _ in reader():
        if stripped := text.rstrip():
            end = length + len(stripped)
        length += len(text)
    position = int(end * (1 - fraction))

    def read(of_tail: bool) -> Iterator[Part]:
        is_first = True
        for in_tail, part in split_at(reader(), position, end):
            if in_tail == of_tail:
                # A text of a word or two may leave one side blank, which is no document.
                if not (is_first and part.is_last and not part.text.strip()):
                    yield part
                is_first = False

    return {"train": lambda: read(of_tail=False), "validation": lambda: read(of_tail=True)}


def split_at(parts: Iterable[Part], position: int, end: int) -> Iterator[tuple[bool, Part]]:
    """Split a document before its first space between the characters `position` and `end`, or else at `position`.

    Yields:
        Whether the part belongs to the tail, and the part.
    """
    begin, is_split = 0, False
    for part in parts:
        text, is_last = part
        start = max(position - begin, 0)
        is_before = is_split or begin + len(text) <= position
        space = None if is_before else SPACE.search(text, start, max(end - begin, 0))
        if is_before or not (space or is_last):
            yield is_split, part
        else:
            place = space.start() if space else start
            yield False, Part(text[:place], is_last=True)
            yield True, Part(text[place:], is_last)
            is_split = True
        begin += len(text)
