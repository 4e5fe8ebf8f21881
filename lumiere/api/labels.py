"""Texts with a class for each token, for probes: by a regular expression, a file of labels, or built-in properties.

Importing this module loads neither torch nor numpy.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.api.target import MAX_LISTED_TOKENS, InspectTarget
from lumiere.errors import DataError, LumiereError, check_choice
from lumiere.files import parse_json, read_file

if TYPE_CHECKING:
    from lumiere.interpret.probe import Labelled

PROPERTIES = ("token", "next-token", "previous-token", "position")
SHIFTS = {"token": 0, "next-token": 1, "previous-token": -1}
SPLITS = ("train", "validation")
MAX_BYTES = 2**26
POSITION_CLASSES = 8
FORM = 'each line is an object such as {"text": "a b", "labels": ["x", null]}, with a label or null for each token'


@dataclass(frozen=True)
class Text:
    """Token ids with the token that follows, where there is one, and the document they are from."""

    ids: tuple[int, ...]
    following: int | None
    document: int


def label_texts(
    found: InspectTarget,
    prop: str,
    regex: str | None,
    labels: str | Path | None,
    file: str | Path | None,
    split: str,
    windows: int,
    num_classes: int,
) -> "tuple[Labelled, str, str]":
    """Return texts with classes, the property in words, and their source.

    Raises:
        LumiereError: The options contradict each other, or a file is damaged or does not align with the tokens.
    """
    check_choice("property", prop, PROPERTIES)
    check_choice("split", split, SPLITS)
    if num_classes < 2:
        raise LumiereError(f"{num_classes} classes are nothing to tell apart", "2 is the least")
    if labels is not None:
        if regex is not None or file is not None or prop != "token":
            raise LumiereError("--labels holds texts and labels", "omit --regex, --file and --property")
        return labels_of_file(found, Path(labels))
    texts, source = (
        file_paragraphs(found, Path(file), windows) if file is not None else window_texts(found, split, windows)
    )
    if prop == "position":
        if regex is not None:
            raise LumiereError("--regex needs the text of a token", "omit --property position")
        return (*by_position(found, texts), source)
    return (*by_token(found, texts, prop, regex, num_classes), source)


def window_texts(found: InspectTarget, split: str, count: int) -> tuple[list[Text], str]:
    """Return windows of a split, drawn by the seed."""
    import numpy as np

    from lumiere.data.batches import permute

    opened = found.opened
    windows = found.corpus(", or give a text with --file or --labels").windows(split, opened.config)
    count = min(count, len(windows))
    drawn = permute(np.arange(count), len(windows), key=str(found.seed))
    tokens, lengths = windows.cut(drawn)
    size, texts = opened.context_size, []
    for row, length, document in zip(tokens.tolist(), lengths.tolist(), windows.documents(drawn).tolist(), strict=True):
        seen = min(length, size)
        texts.append(Text(tuple(row[:seen]), row[seen] if length > seen else None, document))
    name = opened.config.dataset.name
    return texts, f"{count:,} of {len(windows):,} windows of the {split} split of {name} (seed {found.seed})"


def file_paragraphs(found: InspectTarget, path: Path, count: int) -> tuple[list[Text], str]:
    """Return the paragraphs of a file, each a document, in windows of the model's context."""
    from lumiere.data.text import read_text

    tokenizer, size = found.opened.tokenizer, found.opened.context_size
    paragraphs = [part for part in re.split(r"\n\s*\n", read_text(path)) if part.strip()]
    texts: list[Text] = []
    for document, paragraph in enumerate(paragraphs):
        ids = tokenizer.encode(paragraph, start=True)
        first = found.num_start
        step = size - first
        for begin in range(first, len(ids), step):
            row = (*ids[:first], *ids[begin : begin + step])
            texts.append(Text(row, ids[begin + step] if begin + step < len(ids) else None, document))
    if not texts:
        raise LumiereError(f"{str(path)!r} contains no text", "give a file that contains text")
    cut = "" if len(texts) <= count else f", its first {count:,} windows"
    return texts[:count], f"{path}, {len(paragraphs):,} paragraphs{cut}"


def shifted(text: Text, shift: int) -> list[int | None]:
    """Return the token itself, the one after or the one before, for each token; None where there is none."""
    row = [*text.ids, text.following]
    return [row[place + shift] if place + shift >= 0 else None for place in range(len(text.ids))]


def by_token(
    found: InspectTarget, texts: Sequence[Text], prop: str, regex: str | None, num_classes: int
) -> "tuple[Labelled, str]":
    """Label tokens by this, the next or the previous token: whether its text matches, or which one it is."""
    from lumiere.interpret.probe import Labelled

    tokenizer, first = found.opened.tokenizer, found.num_start
    text_ids = set(tokenizer.text_ids)
    others = [shifted(text, SHIFTS[prop]) for text in texts]
    others = [[other if other in text_ids else None for other in row] for row in others]
    which = {"token": "token", "next-token": "next token", "previous-token": "previous token"}[prop]
    classify: Callable[[int], int]
    if regex is not None:
        try:
            pattern = re.compile(regex)
        except re.error as error:
            raise LumiereError(
                f"{regex!r} is no regular expression: {error}", "quote it, such as --regex '^ [A-Z]'"
            ) from None
        matches = {token: int(bool(pattern.search(tokenizer.decode([token])))) for token in text_ids}
        classify, classes, subject = matches.__getitem__, ("other", "match"), f"{which} matches {regex}"
    else:
        common = Counter(other for row in others for other in row[first:] if other is not None).most_common(num_classes)
        numbers = {token: number for number, (token, _) in enumerate(common)}
        classify = lambda token: numbers.get(token, -1)  # noqa: E731
        classes = tuple(found.label(token) for token in numbers)
        subject = f"{which}, the {len(classes)} most frequent"
    labels = [
        [-1 if other is None or place < first else classify(other) for place, other in enumerate(row)] for row in others
    ]
    types = [[-1 if other is None else other for other in row] for row in others]
    rows = [text.ids for text in texts]
    return Labelled(rows, labels, types, [text.document for text in texts], classes), subject


def by_position(found: InspectTarget, texts: Sequence[Text]) -> "tuple[Labelled, str]":
    """Label tokens by their position in the window, in equal ranges."""
    from lumiere.interpret.probe import Labelled

    longest = max(len(text.ids) for text in texts)
    width = -(-longest // min(POSITION_CLASSES, longest))
    count = -(-longest // width)
    classes = tuple(f"{width * i}-{min(width * (i + 1), longest) - 1}" for i in range(count))
    labels = [[place // width if place >= found.num_start else -1 for place in range(len(text.ids))] for text in texts]
    rows = [text.ids for text in texts]
    return Labelled(rows, labels, rows, [text.document for text in texts], classes), "position in the window"


def labels_of_file(found: InspectTarget, path: Path) -> "tuple[Labelled, str, str]":
    """Read texts with labels, one text a line; each is a document.

    Raises:
        LumiereError: A line is damaged, or its labels do not align with its tokens.
    """
    from lumiere.data.text import decode
    from lumiere.interpret.probe import Labelled

    try:
        lines = decode(read_file(path, MAX_BYTES), str(path)).split("\n")
    except OSError as error:
        raise LumiereError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    first, rows, given = found.num_start, list[tuple[int, ...]](), list[list[Any]]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}", FORM) from None
        values = record.get("labels") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not isinstance(values, list):
            raise DataError(f"{path}, line {number}: it has no text or no list of labels", FORM)
        if not all(value is None or isinstance(value, str | int | bool) for value in values):
            raise DataError(f"{path}, line {number}: a label is neither a text nor a number", FORM)
        ids = found.prompt_tokens(record["text"])
        if len(values) != len(ids) - first:
            shown = " ".join(found.label(token) for token in ids[first:][:MAX_LISTED_TOKENS])
            more = " ..." if len(ids) - first > MAX_LISTED_TOKENS else ""
            raise DataError(
                f"{path}, line {number}: {len(values)} labels for {len(ids) - first} tokens: {shown}{more}", FORM
            )
        rows.append(ids)
        given.append([None] * first + values)
    names = sorted({str(value) for row in given for value in row if value is not None})
    if len(names) < 2:
        raise DataError(f"{path} has {len(names)} classes of labels", "a probe tells two or more apart")
    numbers = {name: number for number, name in enumerate(names)}
    labels = [[-1 if value is None else numbers[str(value)] for value in row] for row in given]
    source = f"{len(rows):,} texts of {path}"
    return Labelled(rows, labels, rows, range(len(rows)), tuple(names)), "label", source
