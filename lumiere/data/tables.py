"""One column of CSV, JSON, Parquet and Arrow files: no value is guessed, dropped or converted."""

import csv
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

from lumiere.errors import DataError, nearest, shortened

if TYPE_CHECKING:
    import pyarrow

SEPARATORS = (",", ";", "\t", "|")
MAX_FIELD_CHARACTERS = 2**31 - 1
CHUNK_CHARACTERS = 1_000_000
ARROW_ROWS = 1000
TEXT = "text"
SPACE = re.compile(r"\s*")
KINDS = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}


def csv_rows(paths: Iterable[str], column: str, separator: str | None = None) -> Iterator[str]:
    """Yield the text of `column` in each row of CSV files; an empty line is an empty row.

    Args:
        separator: Default: the first of `SEPARATORS` with which the header has the column.

    Raises:
        DataError: A file cannot be read, its header lacks the column, or a row has another number of fields.
    """
    # The default limit of 131,072 characters is shorter than a book. It is global to the process.
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    for path in paths:
        with opened(path) as file:
            found, index, width = read_header(path, file, column, separator)
            file.seek(0)
            reader = csv.reader(file, delimiter=found, strict=True)
            line = 1
            try:
                for fields in reader:
                    # Extra empty fields are trailing separators.
                    if fields and (len(fields) < width or any(fields[width:])):
                        raise DataError(
                            f"{path!r}, line {line}: the row has {len(fields)} fields, the header has {width}",
                            f'quote texts that contain the separator: "one{found} two"',
                        )
                    if line > 1:
                        yield fields[index] if fields else ""
                    line = reader.line_num + 1
            except csv.Error as error:
                raise unreadable(path, line, str(error)) from None


def read_header(path: str, file: TextIO, column: str, separator: str | None) -> tuple[str, int, int]:
    """Return the separator, the index of the column, and the number of fields in the header of a CSV file."""
    names: list[str] = []
    for candidate in (separator,) if separator else SEPARATORS:
        file.seek(0)
        try:
            header = [name.strip() for name in next(csv.reader(file, delimiter=candidate), [])]
        except csv.Error as error:
            raise unreadable(path, 1, str(error)) from None
        if header.count(column) > 1:
            raise DataError(f"{path!r} has several columns '{column}'", "rename one of them in the first line")
        if column in header:
            return candidate, header.index(column), len(header)
        names = max(names, header, key=len)
    raise no_column(path, column, [name for name in names if name])


def json_rows(paths: Iterable[str], column: str) -> Iterator[str]:
    """Yield the text of `column` in each object of JSON files: one object per line, or a list of objects.

    `doc.text` is the key `text` of the object in `doc`, unless there is a key of that exact name. Null and missing keys
    are empty rows.

    Raises:
        DataError: A file cannot be read or is not JSON, a value of the column is not text, or no row has the column.
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
                    raise not_text(f"{path!r}, {place}", column, KINDS[type(value)], text_columns(row))
                yield value or ""
    if first is not None and not has_column:
        raise no_column(first[0], column, list(first[1]), text_columns(first[1]))


def json_objects(path: str, file: TextIO) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the objects of a JSON file, each with its position in words."""
    beginning = file.read(CHUNK_CHARACTERS)
    if beginning.lstrip().startswith("["):
        unit, values = "item", json_list(path, file, beginning)
    else:
        file.seek(0)
        unit, values = "line", json_lines(path, file)
    for number, value in values:
        if not isinstance(value, dict):
            raise DataError(
                f"{path!r}, {unit} {number}: {KINDS.get(type(value), 'a text')} is no row",
                'write one object per line, such as {"text": "..."}, or a list of objects',
            )
        yield f"{unit} {number}", value


def json_lines(path: str, file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise unreadable(path, number, str(error)) from None


def json_list(path: str, file: TextIO, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the items of a list that starts with `text`, a few in memory at a time."""
    decode, number = json.JSONDecoder().raw_decode, 1
    at = after_space(text, text.index("[") + 1)
    while True:
        try:
            value, end = decode(text, at)
            end = after_space(text, end)
            # An item is complete only if something follows: `1` may be the start of `12`.
            if end == len(text):
                raise ValueError("the list does not end")
        except (ValueError, RecursionError) as error:
            # Perhaps incomplete. Read as much again, so that each character is parsed twice on average.
            if more := file.read(max(CHUNK_CHARACTERS, len(text) - at)):
                text = text[at:] + more
                at = after_space(text, 0)
                continue
            if number == 1 and text[at : at + 1] == "]":
                return
            reason = shortened(str(error))
            raise DataError(
                f"{path!r}, item {number}: {reason}", "fix the file, or write one object per line"
            ) from None
        yield number, value
        if text[end] == "]":
            return
        if text[end] != ",":
            raise DataError(f"{path!r}: a comma is missing after item {number}", "fix the file")
        at, number = after_space(text, end + 1), number + 1


def after_space(text: str, at: int) -> int:
    """Return the end of the white space that starts at `at`."""
    return cast("re.Match[str]", SPACE.match(text, at)).end()


def value_at(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Return whether a row has the column, and its value: None if null or missing."""
    if column in row:
        return True, row[column]
    outer, dot, inner = column.partition(".")
    if dot and isinstance(row.get(outer), dict):
        return value_at(row[outer], inner)
    return False, None


def text_columns(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the columns of a row that hold text, nested ones included."""
    columns = []
    for name, value in row.items():
        if isinstance(value, str):
            columns.append(prefix + name)
        elif isinstance(value, dict):
            columns += text_columns(value, f"{prefix}{name}.")
    return columns


def arrow_rows(paths: Iterable[str], column: str, kind: str) -> Iterator[str]:
    """Yield the text of `column` in each row of `parquet` or `arrow` files, batch by batch; null is an empty row.

    `doc.text` is the field `text` of the column `doc`, unless there is a column of that exact name.

    Raises:
        DataError: A file cannot be read, or has no such column of text.
    """
    import fsspec

    for path in paths:
        try:
            with fsspec.open(path, "rb") as file:
                schema, read = open_arrow(cast("BinaryIO", file), kind)
                outer, inner = arrow_column(path, column, schema)
                for batch in read(outer):
                    for row in batch.column(outer).to_pylist():
                        for key in inner:
                            row = None if row is None else row[key]
                        yield row or ""
        except DataError:
            raise
        except Exception as error:  # each file system has its own
            reason = shortened(" ".join(str(error).split()) or type(error).__name__)
            raise DataError(
                f"{path!r} cannot be read as {kind}: {reason}",
                "restore the file, or try again if it was the network: what was encoded so far is kept",
            ) from None


def open_arrow(file: BinaryIO, kind: str) -> tuple["pyarrow.Schema", Callable[[str], Iterator["pyarrow.RecordBatch"]]]:
    """Return the schema of a file, and a function that reads a column, at most `ARROW_ROWS` rows at a time."""
    import pyarrow
    from pyarrow import ipc, parquet

    if kind == "parquet":
        table = parquet.ParquetFile(file)
        return table.schema_arrow, lambda column: table.iter_batches(ARROW_ROWS, columns=[column])
    try:
        stream = ipc.open_stream(file)
        schema, batches = stream.schema, iter(stream)
    except pyarrow.ArrowInvalid:
        reader = ipc.open_file(file)
        schema, batches = reader.schema, map(reader.get_batch, range(reader.num_record_batches))

    def read(column: str) -> Iterator["pyarrow.RecordBatch"]:
        for whole in batches:
            batch = whole.select([column])
            batch.validate(full=True)  # a damaged file could point outside of its memory
            yield from (batch.slice(first, ARROW_ROWS) for first in range(0, batch.num_rows, ARROW_ROWS))

    return schema, read


def arrow_column(path: str, column: str, schema: "pyarrow.Schema") -> tuple[str, list[str]]:
    """Return the column and the fields within it that `column` names.

    Raises:
        DataError: There is none of text.
    """
    kinds = arrow_kinds(schema)
    texts = [name for name, kind in kinds.items() if kind == TEXT]
    kind = kinds.get(column)
    if kind is None:
        raise no_column(path, column, list(kinds), texts)
    if kind not in (TEXT, "null"):
        raise not_text(repr(path), column, kind, texts)
    if column in schema.names:
        return column, []
    outer, *inner = column.split(".")
    return outer, inner


def arrow_kinds(fields: "Iterable[pyarrow.Field]", prefix: str = "") -> dict[str, str]:
    """Return what each column holds, nested columns by dotted name."""
    from pyarrow import types

    kinds = {}
    for field in fields:
        name, kind = prefix + field.name, field.type
        if types.is_struct(kind):
            kinds |= {name: "objects"} | arrow_kinds(kind, f"{name}.")
        else:
            is_text = types.is_string(kind) or types.is_large_string(kind)
            kinds[name] = TEXT if is_text else str(kind)
    return kinds


def not_text(place: str, column: str, kind: str, texts: Sequence[str]) -> DataError:
    """Return the error for a column that does not hold text, and name those that do."""
    return DataError(
        f"{place}: the column '{column}' holds {kind}, not text",
        f"columns with text: {', '.join(texts)}" if texts else "choose another file or column",
    )


def no_column(name: str, column: str, columns: Sequence[str], texts: Sequence[str] | None = None) -> DataError:
    """Return the error for a missing column.

    Args:
        columns: All columns.
        texts: Columns that hold text. Default: all.
    """
    texts = columns if texts is None else texts
    nested = [name for name in texts if name.rpartition(".")[2] == column]
    close = nested[0] if len(nested) == 1 else nearest(column, texts)
    guess = close or (texts[0] if len(texts) == 1 and len(columns) > 1 else None)
    if guess:
        hint = f"--set dataset.text_column={guess}"
    else:
        hint = f"columns with text: {', '.join(texts)}" if texts else "choose a dataset with a column of text"
    return DataError(f"'{name}' has no column '{column}', it has {shortened(', '.join(columns))}", shortened(hint))


def unreadable(path: str, line: int, reason: str) -> DataError:
    return DataError(f"{path!r}, line {line}: {shortened(reason)}", "fix the file at that line")


@contextmanager
def opened(path: str) -> Iterator[TextIO]:
    """Open a text file, which may be compressed or remote.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    import fsspec

    try:
        # `newline=""` preserves line ends inside quoted fields.
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
