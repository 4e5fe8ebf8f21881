"""Tables: every text that was written comes back, and what is not text is an error with its place."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumiere.data import tables
from lumiere.data.tables import arrow_rows, csv_rows, json_rows
from lumiere.errors import DataError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8)

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes, name: str = "table") -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def refusal(rows: Iterable[str]) -> DataError:
    with pytest.raises(DataError) as caught:
        list(rows)
    assert caught.value.hint
    return caught.value


def csv_text(texts: list[str]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([["n", "text"], *([i, text] for i, text in enumerate(texts))])
    return file.getvalue()


def arrow_bytes(table: pyarrow.Table, kind: str) -> bytes:
    """Write a table as Parquet, as an Arrow file, or as a stream of Arrow batches."""
    file = io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return file.getvalue()


@given(TEXTS)
def test_every_format_gives_what_was_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    rows = [{"n": i, "text": text} for i, text in enumerate(texts)]
    columns = pyarrow.table({"n": list(range(len(texts))), "text": pyarrow.array(texts, "string")})
    written: list[tuple[Callable[..., Iterable[str]], str | bytes, tuple[str, ...]]] = [
        (csv_rows, csv_text(texts), ()),
        *(
            (json_rows, content, ())
            for content in (
                "\n".join(map(json.dumps, rows)),
                json.dumps(rows),
                json.dumps(rows, indent=2, ensure_ascii=False),
            )
        ),
        (arrow_rows, arrow_bytes(columns, "parquet"), ("parquet",)),
        *((arrow_rows, arrow_bytes(columns, kind), ("arrow",)) for kind in ("file", "stream")),
    ]
    path = tmp_path_factory.mktemp("tables") / "table"
    for read, content, kind in written:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        assert list(read([str(path)], "text", *kind)) == texts


# CSV


def test_words_that_others_read_as_missing_are_text(write: Write) -> None:
    words = ["null", "None", "NA", "nan", "NaN", "N/A", "<NA>", "-inf", "1", "1.0", "True", "007"]
    assert list(csv_rows([write("\n".join(["text", *words]))], "text")) == words


@pytest.mark.parametrize(
    "content",
    ["id,text\n1,a\n2,b\n", "id;text\n1;a\n2;b\n", "id\ttext\n1\ta\n2\tb\n", "text|id\na|1\nb|2\n",
     "id, text\n1,a\n2,b\n", "\ufeffid,text\r\n1,a\r\n2,b\r\n", "id,text,\n1,a,\n2,b,\n", "id,text\n1,a,\n2,b,,\n"],
)  # fmt: skip
def test_separators_and_trailing_separators(write: Write, content: str) -> None:
    assert list(csv_rows([write(content)], "text")) == ["a", "b"]


def test_a_given_separator_is_the_only_one(write: Write) -> None:
    assert "'text'" in refusal(csv_rows([write("id,text\n1,a\n")], "text", "\t")).message


def test_empty_lines_and_long_fields(write: Write) -> None:
    assert list(csv_rows([write('text\na\n\n""\nb\n')], "text")) == ["a", "", "", "b"]
    text = "a\r\nb\n" * 100_000
    assert list(csv_rows([write(f'text\r\n"{text}"\r\n')], "text")) == [text]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("text\nHello, world\nb\n", 2),
        ("text\na\nHello, world\n", 3),
        ('id,text\n1,"two\nlines"\n2,a,b\n', 4),
        ("id,text\n1,a\n2\n", 3),
        ('text\na\n"b"c\n', 3),
        ('text\na\n"no end\nb\n', 3),
    ],
)
def test_a_row_with_another_number_of_fields_is_an_error(write: Write, content: str, line: int) -> None:
    assert f"line {line}:" in refusal(csv_rows([write(content)], "text")).message


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("n,txet\n1,a\n", "text_column=txet"),
        ("title,body\na,b\n", "title, body"),  # none of them is chosen
        ("n;Text\n1;a\n", "text_column=Text"),
        ("n\n1\n", "columns with text: n"),
        ("", "choose a dataset"),
        ("text,text\na,b\n", "rename"),
    ],
)
def test_a_missing_column(write: Write, content: str, hint: str) -> None:
    assert hint in (refusal(csv_rows([write(content)], "text")).hint or "")


# JSON


def test_a_list_is_read_in_pieces(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "ab" * i} for i in range(50)]
    path = write(" [ " + " , ".join(map(json.dumps, rows)) + " ] ")
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(tables, "CHUNK_CHARACTERS", size + 2)
        assert list(json_rows([path], "text")) == [row["text"] for row in rows]


def test_nested_columns_and_nulls(write: Write) -> None:
    path = write('{"doc": {"text": "a"}, "x.y": "b"}\n{"doc": {"text": null}}\n{"doc": null}\n{"doc": {}}\n')
    assert list(json_rows([path], "doc.text")) == ["a", "", "", ""]
    assert list(json_rows([path], "x.y")) == ["b", "", "", ""]
    assert "doc.text" in (refusal(json_rows([path], "text")).hint or "")
    paths = [write('{"text": null}\n' * 3, "a"), write('{"text": "b"}\n', "b")]
    assert list(json_rows(paths, "text")) == ["", "", "", "b"]


@pytest.mark.parametrize(
    ("value", "kind"), [("12", "a number"), ("1.5", "a number"), ('["a"]', "a list"), ('{"a": 1}', "an object"),
                        ("true", "a boolean")],
)  # fmt: skip
def test_what_is_no_text_is_named_with_its_line(write: Write, value: str, kind: str) -> None:
    error = refusal(json_rows([write(f'{{"text": "a", "title": "t"}}\n{{"text": {value}, "title": "t"}}\n')], "text"))
    assert "line 2" in error.message
    assert kind in error.message
    assert "title" in (error.hint or "")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('{"text": "a"}\n{no\n', "line 2"),
        ('{"text": "a"}\n"b"\n', "line 2"),
        ('[{"text": "a"}, {"text"', "item 2"),
        ('[{"text": "a"} {"text": "b"}]', "item 1"),
        ('[{"text": "a"}, 3]', "item 2"),
        ("[" * 100_000, "item 1"),
        ('{"a":' * 100_000, "line 1"),
        ("[", "item 1"),
    ],
)
def test_damaged_json_is_named_with_its_place(write: Write, content: str, place: str) -> None:
    assert place in refusal(json_rows([write(content)], "text")).message


@pytest.mark.parametrize(("read", "content"), [(csv_rows, "text\ncafé\n"), (json_rows, '{"text": "café"}')])
def test_other_encodings_and_compressed_files(write: Write, read: Any, content: str) -> None:
    assert "iconv" in (refusal(read([write(content.encode("latin-1"))], "text")).hint or "")
    packed = gzip.compress(content.encode())
    assert list(read([write(packed, "t.gz")], "text")) == ["café"]
    for damaged in (packed[:-6], packed[:12] + b"\xff\xff" + packed[14:], b"no"):
        refusal(read([write(damaged, "damaged.gz")], "text"))


# Parquet and Arrow


def test_nested_columns_of_parquet_files_and_their_nulls(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ARROW_ROWS", 2)
    rows = [{"text": "a"}, {"text": None}, None, {"text": "é"}, {"text": "b"}]
    columns = {"doc": rows, "x.y": list("abcde"), "nothing": [None] * 5}
    path = write(arrow_bytes(pyarrow.table(columns), "parquet"), "[1] notes.parquet")  # never read as a pattern
    assert list(arrow_rows([path, path], "doc.text", "parquet")) == ["a", "", "", "é", "b"] * 2
    assert list(arrow_rows([path], "x.y", "parquet")) == list("abcde")
    assert list(arrow_rows([path], "nothing", "parquet")) == [""] * 5


@pytest.mark.parametrize(
    ("column", "named", "hint"),
    [
        ("text", "it has n, txet, doc, doc.body, words", "text_column=txet"),
        ("n", "int64", "txet, doc.body"),
        ("body", "'body'", "text_column=doc.body"),
        ("doc", "objects", "doc.body"),
        ("words", "list", "doc.body"),
    ],
)
def test_columns_of_parquet_files_without_text(write: Write, column: str, named: str, hint: str) -> None:
    row = {"n": [1], "txet": ["a"], "doc": [{"body": "b"}], "words": [["c"]]}
    path = write(arrow_bytes(pyarrow.table(row), "parquet"))
    error = refusal(arrow_rows([path], column, "parquet"))
    assert named in error.message
    assert hint in (error.hint or "")


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_damaged_parquet_and_arrow_files_are_errors(write: Write, kind: str) -> None:
    table = pyarrow.table({"text": ["a long text"] * 1000})
    whole = arrow_bytes(table, kind)
    size = len(whole)
    contents = [b"", b"no", whole[: size // 2], whole[: size // 2] + b"\xff" * 60 + whole[size // 2 + 60 :]]
    for content in contents:
        path = write(content)
        found = []
        with pytest.raises(DataError, match=path):
            found.extend(arrow_rows([path], "text", "parquet" if kind == "parquet" else "arrow"))
        assert set(found) <= {"a long text"}
