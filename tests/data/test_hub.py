"""Rows through `datasets`: every builder, local folders, and what is said where there is nothing to read."""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import huggingface_hub.constants
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HFValidationError

from lumiere.config.schema import DatasetConfig
from lumiere.data import hub
from lumiere.data.corpus import TextFiles, find_source, joined, load_rows
from lumiere.data.hub import Rows, hub_reachable
from lumiere.data.sources import ENDINGS
from lumiere.errors import DataError

PROJECT = Path(__file__).parents[2]
OUT_OF_REACH = "http://127.0.0.1:9"
README = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small.txt}
- config_name: large
  data_files:
  - {split: train, path: large.txt}
---
"""


@pytest.fixture(autouse=True)
def hub_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries read the environment when they are imported; what they took is set, and set back, here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "getproxies", dict)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the Hub could be reached, which no test does."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)


def rows(**settings: Any) -> dict[str, list[str]]:
    """The rows of each split; of plain text the documents, or the lines where those are to be grouped."""

    def texts(found: Iterable[str]) -> Iterator[str]:
        return (
            joined(found.parts()) if isinstance(found, TextFiles) and "document_start" not in settings else iter(found)
        )

    return {split: list(texts(found)) for split, found in load_rows(DatasetConfig(**settings))[0].items()}


def refusal(**settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load_rows(DatasetConfig(**settings))
    assert caught.value.hint
    return caught.value


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text.encode())
    return name


# What can be read


def test_text_files_are_documents() -> None:
    book, letter = write("book.txt", "one\n\ntwo"), write("letter.txt", "dear\r\nyou\n")
    assert rows(name="text", data_files=book) == {"train": ["one\n\ntwo"]}
    # Line ends come as Python reads them.
    assert rows(name="text", data_files=[book, letter]) == {"train": ["one\n\ntwo", "dear\nyou\n"]}
    splits = {"train": book, "validation": [letter]}
    assert rows(name="text", data_files=splits) == {"train": ["one\n\ntwo"], "validation": ["dear\nyou\n"]}


def test_lines_that_are_grouped_keep_their_ends() -> None:
    write("book.txt", "= A =\n\none\ntwo")
    assert rows(name="text", data_files="book.txt", document_start="^=") == {"train": ["= A =\n", "\n", "one\n", "two"]}


def test_builders_of_tables() -> None:
    texts = ["one", "", 'a "b",\nc']
    write("table.json", "\n".join(json.dumps({"text": text or None, "n": 1}) for text in texts))
    write("table.csv", 'n,text\n1,one\n1,\n1,"a ""b"",\nc"\n')
    datasets.Dataset.from_dict({"text": texts, "n": [1, 2, 3]}).to_parquet("table.parquet")
    for builder in ("json", "csv", "parquet"):
        assert rows(name=builder, data_files=f"table.{builder}") == {"train": texts}


def test_another_column() -> None:
    write("table.csv", "text,body\na,b\n")
    assert rows(name="csv", data_files="table.csv", text_column="body") == {"train": ["b"]}


def test_more_rows_than_a_batch_can_be_read_twice() -> None:
    texts = [f"row {i}" for i in range(2500)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet("table.parquet")
    train = load_rows(DatasetConfig(name="parquet", data_files="table.parquet"))[0]["train"]
    assert list(train) == texts
    assert list(train) == texts


def test_a_dataset_folder_with_subsets() -> None:
    write("corpus/README.md", README)
    write("corpus/small.txt", "a\n")
    write("corpus/large.txt", "a\nb\n")
    assert rows(name="corpus", subset="large") == {"train": ["a\nb\n"]}
    assert rows(name="./corpus", subset="small") == {"train": ["a\n"]}
    assert "'small', 'large'" in refusal(name="corpus").message
    missing = refusal(name="corpus", subset="smal")
    assert "'smal'" in missing.message
    assert missing.hint == "--set dataset.subset=small"


def test_a_folder_of_files_needs_no_readme() -> None:
    write("corpus/train.csv", "text\na\n")
    write("corpus/test.csv", "text\nb\n")
    assert rows(name="corpus") == {"train": ["a"], "test": ["b"]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "json", "data_files": "a.jsonl"}, {"train": ["a", "", "b"]}),
        ({"name": "csv", "data_files": {"train": "a.csv", "test": "b.csv"}}, {"train": ["a"], "test": ["b"]}),
        ({"name": "text", "data_files": ["a.txt", "b.txt"]}, {"train": ["a\nb", "c"]}),
        ({"name": "text", "data_files": "a.txt", "document_start": "^a"}, {"train": ["a\n", "b"]}),
        ({"name": "corpus"}, {"train": ["a"], "test": ["b"]}),
    ],
)
def test_a_stream_gives_the_same_rows(settings: dict[str, Any], expected: dict[str, list[str]]) -> None:
    write("a.jsonl", '{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    for name in ("a.csv", "corpus/train.csv"):
        write(name, "text\na\n")
    for name in ("b.csv", "corpus/test.csv"):
        write(name, "text\nb\n")
    write("a.txt", "a\nb")
    write("b.txt", "c")
    assert rows(**settings) == expected
    assert rows(**settings, streaming=True) == expected


def test_a_stream_has_the_same_columns() -> None:
    write("t.csv", "n,body\n1,a\n")
    refused = [refusal(name="csv", data_files="t.csv", streaming=streaming) for streaming in (False, True)]
    assert refused[0].message == refused[1].message
    assert refused[0].message.endswith("has no column 'text', it has n, body")
    assert refused[0].hint == refused[1].hint


def test_a_stream_that_breaks_off_is_an_error() -> None:
    def break_off(batch_size: int) -> Iterator[dict[str, list[str]]]:
        yield {"text": ["a"]}
        raise ConnectionError("reset by\npeer")

    dataset = SimpleNamespace(column_names=["text"], select_columns=lambda column: SimpleNamespace(iter=break_off))
    read = iter(Rows(cast("Any", dataset), "text"))
    assert next(read) == "a"
    with pytest.raises(DataError, match="reset by peer"):
        next(read)


@pytest.mark.parametrize("streaming", [False, True])
def test_fingerprint_changes_with_the_file(streaming: bool) -> None:
    def fingerprint() -> str:
        return load_rows(DatasetConfig(name="text", data_files="book.txt", streaming=streaming))[1]

    write("book.txt", "one")
    first = fingerprint()
    assert fingerprint() == first
    write("book.txt", "two")
    os.utime("book.txt", (1, 1))
    assert fingerprint() != first
    assert rows(name="text", data_files="book.txt") == {"train": ["two"]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("builder", ["text", "csv", "json", "parquet", "arrow"])
def test_a_file_with_the_same_size_and_time_and_another_content_is_read_anew(builder: str, streaming: bool) -> None:
    path, texts = Path(f"file.{builder}"), ("first text", "other text")

    def put(text: str) -> None:
        if builder in ("parquet", "arrow"):
            table = pyarrow.table({"text": [text]})
            if builder == "parquet":
                pyarrow.parquet.write_table(table, path)
            else:
                with pyarrow.ipc.new_stream(path, table.schema) as file:
                    file.write_table(table)
        else:
            path.write_text({"text": text, "csv": f"text\n{text}\n", "json": json.dumps({"text": text})}[builder])
        os.utime(path, (1, 1))

    found, sizes = [], set()
    for text in texts:
        put(text)
        sizes.add(path.stat().st_size)
        loaded, fingerprint = load_rows(DatasetConfig(name=builder, data_files=str(path), streaming=streaming))
        found.append((list(loaded["train"]), fingerprint))
    assert len(sizes) == 1
    assert [loaded for loaded, _ in found] == [[text] for text in texts]
    assert found[0][1] != found[1][1]


def test_moved_files_have_the_same_fingerprint() -> None:
    write("a/train.csv", "text\na\n")
    write("a/valid.csv", "text\nb\n")
    first = load_rows(DatasetConfig(name="a"))[1]
    Path("a").rename("b")
    assert load_rows(DatasetConfig(name="b"))[1] == first
    files: Any = {"validation": "b/valid.csv", "train": "b/train.csv"}
    assert load_rows(DatasetConfig(name="csv", data_files=files))[1] == first
    files["validation"], files["train"] = files["train"], files["validation"]
    assert load_rows(DatasetConfig(name="csv", data_files=files))[1] != first


@pytest.mark.parametrize(
    ("names", "builder"),
    [
        (["a.md", "b.txt", "more/c.MD", "README.md", ".hidden.csv", "LICENSE"], "text"),
        (["train.tsv", "eval.tsv"], "csv"),
        (["a.jsonl.gz", "picture.png", "dataset_infos.json"], "json"),
        (["a.parquet", "state.json"], "parquet"),
    ],
)
def test_the_endings_of_files_tell_what_a_folder_is(names: list[str], builder: str) -> None:
    for name in names:
        write(f"corpus/{name}", "text\na\n")
    found = find_source(DatasetConfig(name="corpus"))
    assert found.builder == builder
    read = [name for name in names if name.lower().endswith(ENDINGS[builder]) or name == "a.jsonl.gz"]
    read = [name for name in read if name != "README.md" and not name.startswith((".", "state", "dataset"))]
    assert sorted(path for paths in found.files.values() for path in paths) == sorted(
        str(Path.cwd() / "corpus" / name) for name in read
    )


@pytest.mark.parametrize(
    ("names", "named"),
    [(["a.txt", "b.csv"], "text, csv"), (["a.tar", "b.pkl"], ".pkl, .tar"), (["train.csv", "vaild.csv"], "vaild.csv")],
)
def test_a_folder_of_several_kinds_or_of_none_is_refused(names: list[str], named: str) -> None:
    for name in names:
        write(f"corpus/{name}", "text\na\n")
    assert named in refusal(name="corpus").message


def test_names_with_brackets_are_no_patterns() -> None:
    for name in ("[1] notes.parquet", "1 notes.parquet"):
        datasets.Dataset.from_dict({"text": [name]}).to_parquet(name)
    assert rows(name="parquet", data_files="[1] notes.parquet") == {"train": ["[1] notes.parquet"]}


@pytest.mark.parametrize("streaming", [False, True])
def test_nested_columns_and_a_first_file_of_nulls(streaming: bool) -> None:
    nested = [{"doc": {"text": "a"}}, {"doc": {"text": None}}, {"doc": None}]
    datasets.Dataset.from_list(nested).to_parquet("nested.parquet")
    settings: dict[str, Any] = {"name": "parquet", "streaming": streaming}
    assert rows(**settings, data_files="nested.parquet", text_column="doc.text") == {"train": ["a", "", ""]}


def test_options_of_a_readme_that_would_be_left_out_are_refused() -> None:
    def put(options: str) -> None:
        write("corpus/README.md", f"---\nconfigs: [{{config_name: default, data_files: a.csv, {options}}}]\n---\n")

    write("corpus/a.csv", "id;text\n1;a\n")
    put("sep: ';'")
    assert rows(name="corpus") == {"train": ["a"]}
    put("skiprows: 1")
    assert "skiprows" in refusal(name="corpus").message


def test_downloaded_files_are_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "datasets--a--b"
    write(str(folder / "refs" / "main"), "0" * 40)
    write(str(folder / "snapshots" / ("0" * 40) / "train.csv"), "text\nnull\n")
    assert rows(name="a/b") == {"train": ["null"]}
    assert "is not on this machine" in refusal(name="a/c").message


# What cannot


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"name": "text"}, "dataset 'text' needs dataset.data_files", "--set dataset.data_files=book.txt"),
        (
            {"name": "text", "data_files": []},
            "dataset 'text' needs dataset.data_files",
            "--set dataset.data_files=book.txt",
        ),
        ({"name": "text", "data_files": "no.txt"}, "no file 'no.txt'", "relative paths"),
        ({"name": "csv", "data_files": {"train": "no.csv"}}, "no file 'no.csv'", "relative paths"),
        ({"name": "parquet", "data_files": "latin.txt"}, "cannot be read as parquet: Parquet", "parquet files"),
        ({"name": "json", "data_files": "latin.txt"}, "is not UTF-8", "iconv"),
        ({"name": "./no"}, "there is no dataset folder './no'", "check dataset.name"),
        ({"name": "/no/folder"}, "there is no dataset folder '/no/folder'", "check dataset.name"),
        ({"name": "~/no-such-folder"}, "there is no dataset folder '~/no-such-folder'", "check dataset.name"),
        ({"name": "empty"}, "none", ".txt"),
        ({"name": "latin.txt"}, "is a file", "dataset.name=text --set dataset.data_files=latin.txt"),
        ({"name": "t.csv"}, "is a file", "dataset.name=csv --set dataset.data_files=t.csv"),
        ({"name": "csv", "data_files": "t.csv"}, "has no column 'text', it has n, txet", "dataset.text_column=txet"),
        (
            {"name": "parquet", "data_files": "t.parquet", "text_column": "n"},
            "the column 'n' of dataset 'parquet' holds int64, not text",
            "columns with text: txet, doc.body",
        ),
        ({"name": "parquet", "data_files": "t.parquet", "text_column": "body"}, "has no column 'body'", "=doc.body"),
        ({"name": "parquet", "data_files": "t.parquet", "text_column": "doc"}, "holds objects, not text", "doc.body"),
        ({"name": "parquet", "data_files": "t.parquet", "text_column": "words"}, "not text", "doc.body"),
        ({"name": "csv", "data_files": "n.csv"}, "has no column 'text', it has n", "columns with text: n"),
        (
            {"name": "someone/something"},
            "is not on this machine, and the Hugging Face Hub cannot be reached",
            "lumiere train tiny",
        ),
        ({"name": "x" * 5000}, "is not on this machine", "lumiere train tiny"),
        ({"name": "a\0b"}, "is not on this machine", "lumiere train tiny"),
    ],
)
def test_refused_datasets(
    settings: dict[str, Any],
    message: str,
    hint: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The library's own handler holds on to the stderr of its import.
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [caplog.handler])
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    write("t.csv", "n,txet\n1,a\n")
    write("n.csv", "n\n1\n")
    row = {"n": [1], "txet": ["a"], "doc": [{"body": "b"}], "words": [["c"]]}
    datasets.Dataset.from_dict(row).to_parquet("t.parquet")
    Path("empty").mkdir()
    error = refusal(**settings)
    assert message in error.message
    assert hint in (error.hint or "")
    assert "\n" not in error.message
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_wikitext_without_the_raw_subset(wikitext: Path) -> None:
    error = refusal(name=str(wikitext), subset="wikitext-2-raw-v1")
    assert error.message.endswith("has no subset 'wikitext-2-raw-v1', it has wikitext-2-v1")
    assert error.hint == "--set dataset.subset=wikitext-2-v1"


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "dataset 'a/b' exists neither"),
        (HFValidationError("Repo id must be"), "dataset 'a/b' exists neither"),
        (ConnectionError("x" * 1000), "dataset 'a/b' cannot be read: xxx"),
        (KeyError(), "dataset 'a/b' cannot be read: KeyError"),
    ],
)
def test_refused_by_the_hub(monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str) -> None:
    def load_dataset_builder(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    error = refusal(name="a/b")
    assert error.message.startswith(message)
    assert len(error.message) < 300


# No network


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_whether_the_hub_is_reachable(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", listening)
    assert hub_reachable()
    monkeypatch.setenv("HF_ENDPOINT", OUT_OF_REACH)
    assert not hub_reachable()
    # Behind a proxy only a request can tell.
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": "http://proxy:3128"})
    assert hub_reachable()


def test_the_hub_is_asked_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked: list[bool] = []
    monkeypatch.setattr(hub, "hub_reachable", lambda: bool(asked.append(True)))
    write("corpus/train.csv", "text\na\n")
    assert rows(name="corpus") == rows(name="csv", data_files="corpus/train.csv")
    assert not asked
    assert "cannot be reached" in refusal(name="someone/something").message
    assert asked
    # From here on the process reads its cache only, and does not wait for the network.
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_network_one_error_says_what_to_do(tmp_path: Path, offline: str) -> None:
    """In a process of its own, as a user starts it, with whatever the libraries print."""
    code = (
        "from lumiere.config.loader import load_config\n"
        "from lumiere.data.corpus import load_corpus\n"
        "from lumiere.errors import DataError\n"
        "try:\n    load_corpus(load_config('small').dataset)\n"
        "except DataError as error:\n    print(error.message, error.hint, sep='\\n')\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {"HF_ENDPOINT": OUT_OF_REACH, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=PROJECT, capture_output=True, text=True, check=True
    )
    message, hint = run.stdout.splitlines()
    assert "Salesforce/wikitext" in message
    assert "--set dataset.name=" in hint
    assert run.stderr == ""
