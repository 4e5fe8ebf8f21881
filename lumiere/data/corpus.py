"""The documents of each split: the built-in stories and chains, plain text files, or anything that `datasets` reads."""

import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, groupby, islice
from operator import itemgetter
from types import TracebackType
from typing import Any, Self

from lumiere.config.schema import DatasetConfig
from lumiere.data.chains import CHAINS_VERSION, chains
from lumiere.data.sources import (
    BUILDERS,
    SPLIT_NAMES,
    SPLITS,
    Source,
    absolute_data_files,
    find_source,
    local,
    split_of,
)
from lumiere.data.stories import STORIES_VERSION, stories
from lumiere.data.tables import csv_rows, json_rows
from lumiere.data.text import Part, blocks, lines, parts
from lumiere.errors import DataError, shortened

DEFAULT_NUM_DOCUMENTS = 20_000
"""Of a built-in corpus."""
MANY_DOCUMENTS = 1_000_000
"""Of more, no list is kept of those that are held out."""

BUILT_IN: Mapping[str, tuple[Callable[[str, int, int], Iterator[str]], int]] = {
    "stories": (stories, STORIES_VERSION),
    "chains": (chains, CHAINS_VERSION),
}
"""By name: what tells the texts of a split, and the version of them."""

ROWS_AT_ONCE = 256
"""Rows whose beginnings of documents are found together."""
SPACE = re.compile(r"\s")

Reader = Callable[[], Iterator[Part]]


@dataclass(frozen=True)
class Corpus:
    """Documents by split; each split can be read any number of times.

    Attributes:
        readers: for each split, a function that starts to read its documents, in parts.
        fingerprint: changes whenever the documents may have changed; cheap, so taken from the source.
        counts: documents of each split, where that is known without reading them.
        unused: splits of the dataset that are none of ours.
        rows: of each split whose documents are the rows of a table.
        missing: why the documents cannot be read, though what they were is known.
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
        """Read the documents in parts, of which few are in memory at a time."""
        return self.readers[split]()

    def documents(self, split: str) -> Iterator[str]:
        """Read the documents one by one."""
        return joined(self.parts(split))


@dataclass
class CountedRows:
    """Rows, and how many of them the last pass found to be empty."""

    rows: Iterable[str]
    num_rows: int = 0
    num_empty: int = 0

    def __iter__(self) -> Iterator[str]:
        self.num_rows = self.num_empty = 0
        for row in self.rows:
            self.num_rows += 1
            self.num_empty += not row.strip()
            yield row


def load_corpus(config: DatasetConfig) -> Corpus:
    """The corpus that `config` names.

    Raises:
        DataError: if it does not exist, cannot be reached, or lacks the subset, the column or a training split.
    """
    if config.name in BUILT_IN:
        return built_in_corpus(config)
    try:
        rows, source = load_rows(config)
        if config.data_sha256 not in (None, source):
            raise DataError(
                f"the files of dataset '{config.name}' are not those that dataset.data_sha256 was recorded for",
                "restore them, or take them as they are now with --set dataset.data_sha256=null",
            )
    except DataError as error:
        if config.data_sha256 is None:
            raise
        # What they were is known, so the corpus may still be in the cache; only reading them is an error.
        return Corpus(
            {split: failing(error) for split in SPLITS}, fingerprint_of(config.data_sha256, config), missing=error
        )
    named, unused = named_splits(rows)
    # Empty lines of a text are no missing documents.
    has_rows = config.document_start is None and not any(isinstance(rows[name], TextFiles) for name in named.values())
    counted = {split: CountedRows(rows[name]) for split, name in named.items() if has_rows}
    readers = {
        split: row_reader(counted.get(split, rows[name]), config.document_start) for split, name in named.items()
    }
    if "train" not in readers:
        found = ", ".join(rows)
        raise DataError(f"dataset '{config.name}' has no split 'train', it has {found}", "choose another dataset")
    if config.num_documents is not None:
        readers["train"] = limited(readers["train"], config.num_documents)
    if "validation" not in readers:
        # Files can be read twice, also where they are called a stream.
        is_stream = config.streaming and not isinstance(rows[named["train"]], TextFiles)
        hold = hold_out_of_stream if is_stream else hold_out
        readers |= hold(readers["train"], config.validation_fraction, config.seed)
    ordered = {split: readers[split] for split in SPLITS if split in readers}
    return Corpus(ordered, fingerprint_of(source, config), unused=unused, rows=counted)


def recorded(config: DatasetConfig) -> DatasetConfig:
    """Return `config` as a run keeps it: with absolute paths and the hash of the local files that it names.

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
    settings = config.model_dump(
        include={"text_column", "document_start", "num_documents", "validation_fraction", "seed"}
    )
    return hashlib.sha256(json.dumps([source, settings], sort_keys=True).encode()).hexdigest()


def failing(error: DataError) -> Reader:
    """Return a reader that raises `error`."""

    def read() -> Iterator[Part]:
        raise error

    return read


def named_splits(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return which of a dataset's splits is our train, validation and test split, and which are not used.

    The exact name comes before the other usual ones (`SPLIT_NAMES`), in their order.
    """
    names = list(names)
    ranks = {name: rank for rank, name in enumerate(SPLIT_NAMES)}
    chosen: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (name not in SPLITS, ranks.get(name.strip().lower(), len(ranks)))):
        if (split := split_of(name)) is not None:
            chosen.setdefault(split, name)
    return chosen, tuple(name for name in names if name not in chosen.values())


def built_in_corpus(config: DatasetConfig) -> Corpus:
    """A corpus of our own, with as many texts held out for validation and for testing as the config says."""
    tell, version = BUILT_IN[config.name]
    num_train = config.num_documents or DEFAULT_NUM_DOCUMENTS
    num_held_out = max(1, round(num_train * config.validation_fraction))
    counts = {"train": num_train, "validation": num_held_out, "test": num_held_out}
    readers: dict[str, Reader] = {
        split: lambda split=split, count=count: (Part(text, True) for text in tell(split, count, config.seed))
        for split, count in counts.items()
    }
    identity = f"{config.name} {version} {config.seed} {counts}"
    return Corpus(readers, hashlib.sha256(identity.encode()).hexdigest(), counts)


def row_reader(rows: Iterable[str], document_start: str | None) -> Reader:
    """Return a reader of documents: each row, or each file of plain text.

    With `document_start`, a document begins at each row, or line, that matches (`grouped_parts`).
    """
    if document_start is not None:
        return lambda: grouped_parts(rows, document_start)
    if isinstance(rows, TextFiles):
        return rows.parts
    return lambda: chain.from_iterable(parts([row]) for row in rows)


def grouped_parts(rows: Iterable[str], document_start: str) -> Iterator[Part]:
    """Group rows into documents.

    A document begins at each row that, stripped, matches the pattern and stands alone: between blank rows, or at the
    corpus' edge. A line such as ` = 1 = ` within a paragraph is thereby no heading. Blank rows are dropped, the others
    joined as they are.
    """
    for _, document in groupby(numbered_rows(rows, document_start), key=itemgetter(0)):
        yield from parts(row for _, row in document)


def numbered_rows(rows: Iterable[str], document_start: str) -> Iterator[tuple[int, str]]:
    """Yield each row that is not blank with the number of its document."""
    number, near = 0, neighbours(rows)
    with Matcher(document_start) as matches:
        while batch := list(islice(near, ROWS_AT_ONCE)):
            alone = [not before.strip() and bool(row.strip()) and not after.strip() for before, row, after in batch]
            found = matches([row.strip() for (_, row, _), is_alone in zip(batch, alone, strict=True) if is_alone])
            for (_, row, _), is_alone in zip(batch, alone, strict=True):
                number += is_alone and next(found)
                if row.strip():
                    yield number, row


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


def neighbours(rows: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Each row between the row before it and the row after it; beyond the edges stand empty rows."""
    iterator = iter(rows)
    previous, row = "", next(iterator, None)
    while row is not None:
        following = next(iterator, None)
        yield previous, row, following or ""
        previous, row = row, following


def limited(reader: Reader, count: int) -> Reader:
    """The first `count` documents."""

    def read() -> Iterator[Part]:
        for number, part in numbered_parts(reader()):
            yield part
            if part.is_last and number + 1 == count:
                return

    return read


def chosen(reader: Reader, is_chosen: Callable[[int], bool]) -> Reader:
    """The documents whose numbers are chosen."""
    return lambda: (part for number, part in numbered_parts(reader()) if is_chosen(number))


def hold_out(reader: Reader, fraction: float, seed: int) -> dict[str, Reader]:
    """Split one reader into training and validation.

    Documents are drawn at random, since a corpus is often sorted; of a single document the tail is held out. They are
    counted when one of the two is first read.
    """

    @cache
    def readers() -> dict[str, Reader]:
        count = sum(part.is_last for part in reader())
        if count > MANY_DOCUMENTS:
            return hold_out_of_stream(reader, fraction, seed)
        if count == 1:
            return hold_out_tail(reader, fraction)
        num_chosen = max(0, min(count - 1, max(1, round(count * fraction))))
        held_out = frozenset(random.Random(seed).sample(range(count), num_chosen))
        return {
            "train": chosen(reader, lambda number: number not in held_out),
            "validation": chosen(reader, held_out.__contains__),
        }

    return {"train": lambda: readers()["train"](), "validation": lambda: readers()["validation"]()}


def hold_out_of_stream(reader: Reader, fraction: float, seed: int) -> dict[str, Reader]:
    """The same for documents that cannot be counted first, or are too many for a list of those that are drawn.

    Each is drawn by itself, by a hash of its number.

    Of two documents or more, at least one is held out and one kept: the second and the first, whatever is drawn.
    """

    def is_held_out(index: int) -> bool:
        digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
        return index == 1 or (index > 1 and int.from_bytes(digest, "little") < fraction * 2**64)

    return {
        "train": chosen(reader, lambda number: not is_held_out(number)),
        "validation": chosen(reader, is_held_out),
    }


def hold_out_tail(reader: Reader, fraction: float) -> dict[str, Reader]:
    """Split a single document: the last `fraction` of its characters, from a space on, is for validation."""
    length = end = 0  # with and without the white space at its end
    for text, _ in reader():
        if stripped := text.rstrip():
            end = length + len(stripped)
        length += len(text)
    position = int(end * (1 - fraction))

    def read(of_tail: bool) -> Iterator[Part]:
        is_first = True
        for in_tail, part in cut_document(reader(), position, end):
            if in_tail == of_tail:
                # A text of a word or two may leave a side blank, which is no document.
                if not (is_first and part.is_last and not part.text.strip()):
                    yield part
                is_first = False

    return {"train": lambda: read(of_tail=False), "validation": lambda: read(of_tail=True)}


def cut_document(parts: Iterable[Part], position: int, end: int) -> Iterator[tuple[bool, Part]]:
    """Cut a document before its first space between the characters `position` and `end`, or else at `position`.

    Yields:
        Whether the part belongs to the tail, and the part.
    """
    begin, is_cut = 0, False
    for part in parts:
        text, is_last = part
        if is_cut:
            yield True, part
        elif begin + len(text) <= position:
            yield False, part
        else:
            space = SPACE.search(text, max(position - begin, 0), max(end - begin, 0))
            if is_cut := space is not None or is_last:
                place = space.start() if space else max(position - begin, 0)
                yield False, Part(text[:place], is_last=True)
                yield True, Part(text[place:], is_last)
            else:
                yield False, part
        begin += len(text)


@dataclass(frozen=True)
class FileRows:
    """One column of CSV or JSON files, read again at each iteration."""

    source: Source
    split: str
    column: str

    def __iter__(self) -> Iterator[str]:
        paths = self.source.files[self.split]
        if self.source.builder == "csv":
            return csv_rows(paths, self.column, self.source.separator)
        return json_rows(paths, self.column)


@dataclass(frozen=True)
class TextFiles:
    """Plain text files. Iterating yields their lines; `parts` reads each file as a document."""

    paths: Sequence[str]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(map(lines, self.paths))

    def parts(self) -> Iterator[Part]:
        return chain.from_iterable(parts(blocks(path)) for path in self.paths)


def load_rows(config: DatasetConfig) -> tuple[dict[str, Iterable[str]], str]:
    """Return the rows of each split, and a fingerprint of where they come from.

    Raises:
        DataError: The dataset does not exist or cannot be reached, would be read by a builder that may run code, or
            lacks the subset or the text column.
    """
    source = find_source(config)
    if source.builder == "text":
        return {split: TextFiles(paths) for split, paths in source.files.items()}, source.identity()
    if source.builder not in ("csv", "json"):
        from lumiere.data.hub import dataset_rows

        return dataset_rows(config, source)
    rows: dict[str, Iterable[str]] = {split: FileRows(source, split, config.text_column) for split in source.files}
    for split in rows:
        next(iter(rows[split]), None)  # a missing column is said before anything is built
    return rows, source.identity()


SECONDS = 5
"""How long a batch of rows may take, which takes microseconds by all but such patterns."""
CODE = """
import faulthandler, json, os, re, signal, sys, warnings
signal.signal(signal.SIGINT, signal.SIG_IGN)
warnings.simplefilter("ignore")
pattern, seconds = json.loads(sys.stdin.readline())
pattern, nowhere = re.compile(pattern), open(os.devnull, "w")
for line in sys.stdin:
    # Its clock is a thread that needs no lock of the interpreter.
    faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
    found = [pattern.search(row) is not None for row in json.loads(line)]
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(found), flush=True)
"""


class Matcher:
    """Tells which rows match a pattern; its process begins with the first rows and ends with the `with` block."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            with self._process, contextlib.suppress(BrokenPipeError):
                pass  # closes its input, upon which it ends

    def __call__(self, rows: Sequence[str]) -> Iterator[bool]:
        """Return for each row whether the pattern is found in it.

        Raises:
            DataError: It takes too long.
        """
        if not rows:
            return iter(())
        if self._process is None:
            command = [sys.executable, "-I", "-S", "-c", CODE]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._send([self._pattern, SECONDS])
        self._send(rows)
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise DataError(
                f"dataset.document_start '{shortened(self._pattern, 60)}' takes more than {SECONDS} seconds on a line",
                "write it without a repeat within a repeat, such as (a+)+",
            )
        return iter(json.loads(line))

    def _send(self, value: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # there is no line to read then
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
