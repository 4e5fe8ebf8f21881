"""One column of CSV and JSON files, read by the standard library: no value is guessed, dropped or converted."""

import csv
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from lumiere.errors import DataError, nearest, shortened

SEPARATORS = (",", ";", "\t", "|")
MAX_FIELD_CHARACTERS = 2**31 - 1
CHUNK_CHARACTERS = 1_000_000
SPACE = re.compile(r"\s*")
KINDS = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}


def csv_rows(paths: Iterable[str], column: str, separator: str | None = None) -> Iterator[str]:
    """Yield the text of `column` in each row of CSV files; an empty line is an empty row.

    Args:
        separator: Default: the first of `SEPARATORS` with which the header has the column.

    Raises:
        DataError: A file cannot be read, its header lacks the column, or a row has another number of fields.
    """
    # The default, 131,072 characters, is shorter than a book. It can only be set for the whole process.
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    for path in paths:
        with opened(path) as file:
            found, index, width = read_header(path, file, column, separator)
            file.seek(0)
            reader = csv.reader(file, delimiter=found, strict=True)
            line = 1
            try:
                for fields in reader:
                    if line > 1:
                        yield field(path, line, fields, index, width, found)
                    line = reader.line_num + 1
            except csv.Error as error:
                raise unreadable(path, line, str(error)) from None


def read_header(path: str, file: TextIO, column: str, separator: str | None) -> tuple[str, int, int]:
    """Return the separator, the place of the column and the number of fields of a CSV file's header."""
    headers = {}
    for candidate in (separator,) if separator else SEPARATORS:
        file.seek(0)
        try:
            names = [name.strip() for name in next(csv.reader(file, delimiter=candidate), [])]
        except csv.Error as error:
            raise unreadable(path, 1, str(error)) from None
        if names.count(column) > 1:
            raise DataError(f"{path!r} has several columns '{column}'", "rename one of them in the first line")
        if column in names:
            return candidate, names.index(column), len(names)
        headers[candidate] = names
    names = max(headers.values(), key=len)
    raise no_column(path, column, [name for name in names if name])


def field(path: str, line: int, fields: Sequence[str], index: int, width: int, separator: str) -> str:
    """Return one field of a row that has as many as the header; separators after the last one do not count."""
    if not fields:
        return ""
    if len(fields) < width or any(fields[width:]):
        raise DataError(
            f"{path!r}, line {line}: the row has {len(fields)} fields, the header has {width}",
            f'quote texts that contain the separator: "one{separator} two"',
        )
    return fields[index]


def json_rows(paths: Iterable[str], column: str) -> Iterator[str]:
    """Yield the text of `column` in each object of JSON files: one object a line, or a list of objects.

    `doc.text` is the key `text` of the object in `doc`, unless there is a key with this very name. Null and a missing
    key are an empty row.

    Raises:
        DataError: A file cannot be read or is not JSON, the column holds something else than text, or no row has it.
    """
    first: tuple[str, Mapping[str, Any]] | None = None
    has_column = False
    for path in paths:
        with opened(path) as file:
            for place, row in json_objects(path, file):
                found, value = value_at(row, column)
                has_column = has_column or found
                first = first or (path, row)
                if value is not None and not isinstance(value, str):
                    raise no_text(f"{path!r}, {place}", row, column, KINDS[type(value)])
                yield value or ""
    if first is not None and not has_column:
        raise no_column(first[0], column, list(first[1]), text_columns(first[1]))


def json_objects(path: str, file: TextIO) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the objects of a JSON file, each with its place in words."""
    beginning = file.read(CHUNK_CHARACTERS)
    if beginning.lstrip().startswith("["):
        values = json_list(path, file, beginning)
        places = "item"
    else:
        file.seek(0)
        values = json_lines(path, file)
        places = "line"
    for number, value in values:
        if not isinstance(value, dict):
            raise DataError(
                f"{path!r}, {places} {number}: {KINDS.get(type(value), 'a text')} is no row",
                'write an object a line, such as {"text": "..."}, or a list of objects',
            )
        yield f"{places} {number}", value


def json_lines(path: str, file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise unreadable(path, number, str(error)) from None


def json_list(path: str, file: TextIO, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the items of a list, of which `text` is the beginning, holding a few at a time."""
    decode, number = json.JSONDecoder().raw_decode, 1
    at = after_space(text, text.index("[") + 1)
    while True:
        try:
            value, end = decode(text, at)
            end = after_space(text, end)
            # What follows an item shows that it is whole: `1` may be the beginning of `12`.
            if end == len(text):
                raise ValueError("the list does not end")
        except (ValueError, RecursionError) as error:
            # An item that is not whole yet. Read as much again, so that each character is looked at twice on average.
            if more := file.read(max(CHUNK_CHARACTERS, len(text) - at)):
                text = text[at:] + more
                at = after_space(text, 0)
                continue
            if number == 1 and text[at : at + 1] == "]":
                return
            raise DataError(
                f"{path!r}, item {number}: {shortened(str(error))}", "mend the file, or write an object a line"
            ) from None
        yield number, value
        if text[end] == "]":
            return
        if text[end] != ",":
            raise DataError(f"{path!r}: a comma is missing after item {number}", "mend the file")
        at, number = after_space(text, end + 1), number + 1


def after_space(text: str, at: int) -> int:
    """Return where white space that begins at `at` ends."""
    return cast("re.Match[str]", SPACE.match(text, at)).end()


def value_at(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Return whether a row has the column, and its value, which is None where it is null or missing."""
    if column in row:
        return True, row[column]
    outer, dot, inner = column.partition(".")
    if dot and isinstance(row.get(outer), dict):
        return value_at(row[outer], inner)
    return False, None


def text_columns(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the columns of a row that hold text, nested ones too."""
    columns = []
    for name, value in row.items():
        if isinstance(value, str):
            columns.append(prefix + name)
        elif isinstance(value, dict):
            columns += text_columns(value, f"{prefix}{name}.")
    return columns


def no_text(where: str, row: Mapping[str, Any], column: str, kind: str) -> DataError:
    """Return the error for a column that holds something else than text."""
    texts = text_columns(row)
    return DataError(
        f"{where}: the column '{column}' holds {kind}, not text",
        f"columns with text: {', '.join(texts)}" if texts else "choose another file, or write the column as text",
    )


def no_column(name: str, column: str, columns: Sequence[str], texts: Sequence[str] | None = None) -> DataError:
    """Return the error for a missing column.

    Args:
        columns: All columns.
        texts: Those that hold text. Default: all.
    """
    texts = columns if texts is None else texts
    guess = nearest(column, texts) or (texts[0] if len(texts) == 1 and len(columns) > 1 else None)
    if guess:
        hint = f"--set dataset.text_column={guess}"
    else:
        hint = f"columns with text: {', '.join(texts)}" if texts else "choose a dataset with a column of text"
    return DataError(f"'{name}' has no column '{column}', it has {shortened(', '.join(columns))}", shortened(hint))


def unreadable(path: str, line: int, reason: str) -> DataError:
    return DataError(f"{path!r}, line {line}: {shortened(reason)}", "mend the file at that line")


@contextmanager
def opened(path: str) -> Iterator[TextIO]:
    """Open a text file, compressed or remote ones too.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    import fsspec

    try:
        # `newline=""` leaves line ends inside quoted fields as they are.
        with fsspec.open(path, "rt", encoding="utf-8-sig", newline="", compression="infer") as file:
            yield file  # pyright: ignore[reportReturnType]
    except UnicodeDecodeError as error:
        name = Path(path).name
        raise DataError(
            f"{path!r} is not UTF-8 text: {error.reason}", f"convert it: iconv -f LATIN1 -t UTF-8 {name} > utf8-{name}"
        ) from None
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path!r} cannot be read: {shortened(str(error))}", "restore the file") from None
