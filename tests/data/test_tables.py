"""CSV and JSON files: every text that was written comes back, and what is not text is an error with its place."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumiere.data import tables
from lumiere.data.tables import csv_rows, json_rows
from lumiere.errors import DataError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: str | bytes, name: str = "table") -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def refusal(rows: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        list(rows)
    assert caught.value.hint
    return caught.value


# CSV


def test_words_that_others_read_as_missing_are_text(write: Any) -> None:
    words = ["null", "None", "NA", "nan", "NaN", "N/A", "<NA>", "-inf", "1", "1.0", "True", "007"]
    assert list(csv_rows([write("\n".join(["text", *words]))], "text")) == words


@given(TEXTS)
def test_csv_files_give_what_was_written(tmp_path_factory: Any, texts: list[str]) -> None:
    file = io.StringIO()
    csv.writer(file).writerows([["n", "text"], *([i, text] for i, text in enumerate(texts))])
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(file.getvalue().encode())
    assert list(csv_rows([str(path)], "text")) == texts


@pytest.mark.parametrize(
    "content",
    ["id,text\n1,a\n2,b\n", "id;text\n1;a\n2;b\n", "id\ttext\n1\ta\n2\tb\n", "text|id\na|1\nb|2\n",
     "id, text\n1,a\n2,b\n", "\ufeffid,text\r\n1,a\r\n2,b\r\n", "id,text,\n1,a,\n2,b,\n", "id,text\n1,a,\n2,b,,\n"],
)  # fmt: skip
def test_separators_and_trailing_separators(write: Any, content: str) -> None:
    assert list(csv_rows([write(content)], "text")) == ["a", "b"]


def test_a_given_separator_is_the_only_one(write: Any) -> None:
    path = write("id,text\n1,a\n")
    assert "no column 'text'" in refusal(csv_rows([path], "text", "\t")).message


def test_empty_lines_and_fields_are_empty_rows(write: Any) -> None:
    assert list(csv_rows([write('text\na\n\n""\nb\n')], "text")) == ["a", "", "", "b"]


def test_long_fields_and_line_ends_within_them(write: Any) -> None:
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
def test_a_row_with_another_number_of_fields_is_an_error(write: Any, content: str, line: int) -> None:
    assert f"line {line}:" in refusal(csv_rows([write(content)], "text")).message


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("n,txet\n1,a\n", "text_column=txet"),
        ("title,body\na,b\n", "title, body"),  # none of them is chosen
        ("n;Text\n1;a\n", "text_column=Text"),
        ("", "choose a dataset"),
        ("text,text\na,b\n", "rename"),
    ],
)
def test_a_missing_column(write: Any, content: str, hint: str) -> None:
    assert hint in (refusal(csv_rows([write(content)], "text")).hint or "")


# JSON


@given(TEXTS)
def test_json_files_give_what_was_written(tmp_path_factory: Any, texts: list[str]) -> None:
    rows = [{"n": i, "text": text} for i, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("json")
    contents = ["\n".join(map(json.dumps, rows)), json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False)]
    for number, content in enumerate(contents):
        path = folder / f"{number}.json"
        path.write_bytes(content.encode())
        assert list(json_rows([str(path)], "text")) == texts


def test_a_list_is_read_in_pieces(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "ab" * i} for i in range(50)]
    path = write(" [ " + " , ".join(map(json.dumps, rows)) + " ] ")
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(tables, "CHUNK_CHARACTERS", size + 2)
        assert list(json_rows([path], "text")) == [row["text"] for row in rows]


def test_nested_columns(write: Any) -> None:
    path = write('{"doc": {"text": "a"}, "x.y": "b"}\n{"doc": {"text": null}}\n{"doc": null}\n{"doc": {}}\n')
    assert list(json_rows([path], "doc.text")) == ["a", "", "", ""]
    assert list(json_rows([path], "x.y")) == ["b", "", "", ""]
    missing = refusal(json_rows([path], "text"))
    assert "doc.text" in (missing.hint or "")


def test_a_first_file_of_nulls(write: Any) -> None:
    paths = [write('{"text": null}\n' * 3, "a"), write('{"text": "b"}\n', "b")]
    assert list(json_rows(paths, "text")) == ["", "", "", "b"]


@pytest.mark.parametrize(
    ("value", "kind"), [("12", "a number"), ("1.5", "a number"), ('["a"]', "a list"), ('{"a": 1}', "an object"),
                        ("true", "a boolean")],
)  # fmt: skip
def test_what_is_no_text_is_named_with_its_line(write: Any, value: str, kind: str) -> None:
    path = write(f'{{"text": "a", "title": "t"}}\n{{"text": {value}, "title": "t"}}\n')
    error = refusal(json_rows([path], "text"))
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
def test_damaged_json_is_named_with_its_place(write: Any, content: str, place: str) -> None:
    assert place in refusal(json_rows([write(content)], "text")).message


# Both


@pytest.mark.parametrize("read", [csv_rows, json_rows])
def test_another_encoding_is_an_error(write: Any, read: Any) -> None:
    content = 'text\n{"text": "café"}\n' if read is csv_rows else '{"text": "café"}'
    assert "iconv" in (refusal(read([write(content.encode("latin-1"))], "text")).hint or "")


@pytest.mark.parametrize(("read", "content"), [(csv_rows, "text\na\n"), (json_rows, '{"text": "a"}')])
def test_compressed_files(write: Any, read: Any, content: str) -> None:
    packed = gzip.compress(content.encode())
    assert list(read([write(packed, "t.gz")], "text")) == ["a"]
    refusal(read([write(packed[:-6], "cut.gz")], "text"))
    refusal(read([write(packed[:12] + b"\xff\xff" + packed[14:], "bad.gz")], "text"))
    refusal(read([write(b"no", "no.gz")], "text"))
