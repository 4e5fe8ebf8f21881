"""Rows through `datasets`: every builder, local folders, the Hub, and the error when there is nothing to read."""

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
import datasets.config
import huggingface_hub.constants
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HFValidationError

from lumiere.config.schema import DatasetConfig
from lumiere.data import hub
from lumiere.data.corpus import TextFiles, find_source, joined, load_rows
from lumiere.data.hub import Rows, hub_reachable
from lumiere.errors import DataError

PROJECT = Path(__file__).parents[2]
UNREACHABLE = "http://127.0.0.1:9"
SUBSETS = """---
configs:
- {config_name: small, data_files: [{split: train, path: small.txt}]}
- {config_name: large, data_files: [{split: train, path: large.txt}]}
---
"""
OPTIONS = "---\nconfigs: [{{config_name: default, data_files: a.csv, {}}}]\n---\n"


@pytest.fixture(autouse=True)
def hub_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolate both libraries, which read the environment when they are imported."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "getproxies", dict)


def rows(**settings: Any) -> dict[str, list[str]]:
    """Return the rows of each split; for plain text the documents, or the lines if they are to be grouped."""

    def texts(found: Iterable[str]) -> Iterable[str]:
        return joined(found.parts()) if isinstance(found, TextFiles) and "document_start" not in settings else found

    return {split: list(texts(found)) for split, found in load_rows(DatasetConfig(**settings))[0].items()}


def refusal(**settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load_rows(DatasetConfig(**settings))
    assert caught.value.hint
    return caught.value


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(text.encode())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        ({"a.txt": "one\n\ntwo", "b.txt": "dear\r\nyou\n"}, {"name": "text", "data_files": ["a.txt", "b.txt"]},
         {"train": ["one\n\ntwo", "dear\nyou\n"]}),
        ({"a.txt": "one", "b.txt": "two"}, {"name": "text", "data_files": {"train": "a.txt", "validation": ["b.txt"]}},
         {"train": ["one"], "validation": ["two"]}),
        ({"a.txt": "= A =\n\none\ntwo"}, {"name": "text", "data_files": "a.txt", "document_start": "^="},
         {"train": ["= A =\n", "\n", "one\n", "two"]}),
        ({"a.csv": 'n,text\n1,one\n1,\n1,"a ""b"",\nc"\n'}, {"name": "csv", "data_files": "a.csv"},
         {"train": ["one", "", 'a "b",\nc']}),
        ({"a.json": '{"text": "one", "n": 1}\n{"text": null}\n{"text": "a"}'}, {"name": "json", "data_files": "a.json"},
         {"train": ["one", "", "a"]}),
        ({"a.csv": "text,body\na,b\n"}, {"name": "csv", "data_files": "a.csv", "text_column": "body"},
         {"train": ["b"]}),
        ({"corpus/train.csv": "text\na\n", "corpus/test.csv": "text\nb\n"}, {"name": "corpus"},
         {"train": ["a"], "test": ["b"]}),
        ({"corpus/README.md": SUBSETS, "corpus/small.txt": "a\n", "corpus/large.txt": "a\nb\n"},
         {"name": "./corpus", "subset": "large"}, {"train": ["a\nb\n"]}),
        ({"corpus/README.md": OPTIONS.format("sep: ';'"), "corpus/a.csv": "id;text\n1;a\n"}, {"name": "corpus"},
         {"train": ["a"]}),
    ],
)  # fmt: skip
def test_rows_of_each_format_also_as_a_stream(
    files: dict[str, str], settings: dict[str, Any], expected: dict[str, list[str]], streaming: bool
) -> None:
    write(files)
    assert rows(**settings, streaming=streaming) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_columns(streaming: bool) -> None:
    texts = ["", *map(str, range(2500))]  # more than a batch
    table = {"text": texts, "doc": [{"text": "a"}, {"text": None}, None] + [{"text": ""}] * 2498}
    datasets.Dataset.from_dict(table).to_parquet("[1] notes.parquet")
    datasets.Dataset.from_dict({"text": ["not this one"]}).to_parquet("1 notes.parquet")
    settings: dict[str, Any] = {"name": "parquet", "data_files": "[1] notes.parquet", "streaming": streaming}
    train = load_rows(DatasetConfig(**settings))[0]["train"]
    assert list(train) == list(train) == texts
    assert rows(**settings, text_column="doc.text") == {"train": ["a"] + [""] * 2500}


def test_subsets_and_options_of_a_readme_are_checked() -> None:
    write({"corpus/README.md": SUBSETS, "corpus/small.txt": "a\n", "corpus/large.txt": "a\nb\n"})
    assert "'small', 'large'" in refusal(name="corpus").message
    missing = refusal(name="corpus", subset="smal")
    assert "'smal'" in missing.message
    assert missing.hint == "--set dataset.subset=small"
    write({"corpus/README.md": OPTIONS.format("skiprows: 1"), "corpus/a.csv": "id;text\n1;a\n"})
    assert "skiprows" in refusal(name="corpus").message


def test_a_stream_reports_the_same_columns() -> None:
    write({"t.csv": "n,body\n1,a\n"})
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
@pytest.mark.parametrize("builder", ["text", "csv", "json", "parquet", "arrow"])
def test_a_file_of_the_same_size_and_time_with_new_content_is_read_again(builder: str, streaming: bool) -> None:
    path = Path(f"file.{builder}")

    def put(text: str) -> None:
        table = pyarrow.table({"text": [text]})
        if builder == "parquet":
            pyarrow.parquet.write_table(table, path)
        elif builder == "arrow":
            with pyarrow.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
        else:
            path.write_text({"text": text, "csv": f"text\n{text}\n", "json": json.dumps({"text": text})}[builder])
        os.utime(path, (1, 1))

    fingerprints, sizes = set(), set()
    for text in ("first text", "other text", "other text"):
        put(text)
        sizes.add(path.stat().st_size)
        loaded, fingerprint = load_rows(DatasetConfig(name=builder, data_files=str(path), streaming=streaming))
        assert list(loaded["train"]) == [text]
        fingerprints.add(fingerprint)
    assert (len(sizes), len(fingerprints)) == (1, 2)


def test_moved_files_have_the_same_fingerprint() -> None:
    write({"a/train.csv": "text\na\n", "a/valid.csv": "text\nb\n"})
    first = load_rows(DatasetConfig(name="a"))[1]
    Path("a").rename("b")
    assert load_rows(DatasetConfig(name="b"))[1] == first
    files: Any = {"validation": "b/valid.csv", "train": "b/train.csv"}
    assert load_rows(DatasetConfig(name="csv", data_files=files))[1] == first
    files["validation"], files["train"] = files["train"], files["validation"]
    assert load_rows(DatasetConfig(name="csv", data_files=files))[1] != first


@pytest.mark.parametrize(
    ("builder", "used", "ignored"),
    [
        ("text", ["a.md", "b.txt", "more/c.MD"], ["README.md", ".hidden.csv", "LICENSE"]),
        ("csv", ["train.tsv", "eval.tsv"], []),
        ("json", ["a.jsonl.gz"], ["picture.png", "dataset_infos.json"]),
        ("parquet", ["a.parquet"], ["state.json"]),
    ],
)
def test_file_endings_determine_the_format_of_a_folder(builder: str, used: list[str], ignored: list[str]) -> None:
    write({f"corpus/{name}": "text\na\n" for name in used + ignored})
    found = find_source(DatasetConfig(name="corpus"))
    assert found.builder == builder
    paths = sorted(path for paths in found.files.values() for path in paths)
    assert paths == sorted(str(Path.cwd() / "corpus" / name) for name in used)


@pytest.mark.parametrize(
    ("names", "named"),
    [(["a.txt", "b.csv"], "text, csv"), (["a.tar", "b.pkl"], ".pkl, .tar"), (["train.csv", "vaild.csv"], "vaild.csv")],
)
def test_a_folder_of_several_or_unknown_formats_is_rejected(names: list[str], named: str) -> None:
    write({f"corpus/{name}": "text\na\n" for name in names})
    assert named in refusal(name="corpus").message


def test_downloaded_files_are_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "datasets--a--b"
    write({f"{folder}/refs/main": "0" * 40, f"{folder}/snapshots/{'0' * 40}/train.csv": "text\nnull\n"})
    assert rows(name="a/b") == {"train": ["null"]}
    assert "is not on this machine" in refusal(name="a/c").message


PARQUET = {"name": "parquet", "data_files": "t.parquet"}


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"name": "text"}, "'text' needs dataset.data_files", "--set dataset.data_files=book.txt"),
        ({"name": "text", "data_files": []}, "'text' needs dataset.data_files", "--set dataset.data_files=book.txt"),
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
        ({"name": "csv", "data_files": "n.csv"}, "has no column 'text', it has n", "columns with text: n"),
        ({**PARQUET, "text_column": "n"}, "the column 'n' of dataset 'parquet' holds int64", "text: txet, doc.body"),
        ({**PARQUET, "text_column": "body"}, "has no column 'body'", "=doc.body"),
        ({**PARQUET, "text_column": "doc"}, "holds objects, not text", "doc.body"),
        ({**PARQUET, "text_column": "words"}, "not text", "doc.body"),
        ({"name": "someone/something"}, "is not on this machine, and the Hugging Face Hub", "lumiere train tiny"),
        ({"name": "x" * 5000}, "is not on this machine", "lumiere train tiny"),
        ({"name": "a\0b"}, "is not on this machine", "lumiere train tiny"),
    ],
)  # fmt: skip
def test_rejected_datasets(
    settings: dict[str, Any],
    message: str,
    hint: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The library's own handler holds on to the stderr of its import.
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [caplog.handler])
    write({"t.csv": "n,txet\n1,a\n", "n.csv": "n\n1\n"})
    Path("latin.txt").write_bytes("café".encode("latin-1"))
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


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "dataset 'a/b' exists neither"),
        (HFValidationError("Repo id must be"), "dataset 'a/b' exists neither"),
        (ConnectionError("x" * 1000), "dataset 'a/b' cannot be read: xxx"),
        (KeyError(), "dataset 'a/b' cannot be read: KeyError"),
    ],
)
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str) -> None:
    def load_dataset_builder(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    error = refusal(name="a/b")
    assert error.message.startswith(message)
    assert len(error.message) < 300


def test_whether_the_hub_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_reachable()
    monkeypatch.setenv("HF_ENDPOINT", UNREACHABLE)
    assert not hub_reachable()
    # Behind a proxy only a request can tell.
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": "http://proxy:3128"})
    assert hub_reachable()


def test_the_hub_is_contacted_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked: list[bool] = []
    monkeypatch.setattr(hub, "hub_reachable", lambda: bool(asked.append(True)))
    write({"corpus/train.csv": "text\na\n"})
    assert rows(name="corpus") == rows(name="csv", data_files="corpus/train.csv")
    assert not asked
    assert "cannot be reached" in refusal(name="someone/something").message
    assert asked
    # The process now reads only its cache, without waiting for the network.
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_network_there_is_one_error_with_a_hint(tmp_path: Path, offline: str) -> None:
    """In a subprocess, to see everything that the libraries print."""
    code = (
        "from lumiere.config.loader import load_config\n"
        "from lumiere.data.corpus import load_corpus\n"
        "from lumiere.errors import DataError\n"
        "try:\n    load_corpus(load_config('small').dataset)\n"
        "except DataError as error:\n    print(error.message, error.hint, sep='\\n')\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {"HF_ENDPOINT": UNREACHABLE, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=PROJECT, capture_output=True, text=True, check=True
    )
    message, hint = run.stdout.splitlines()
    assert "Salesforce/wikitext" in message
    assert "--set dataset.name=" in hint
    assert run.stderr == ""
