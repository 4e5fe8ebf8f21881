"""Sources of rows: every format, local folders, the Hub, and the error when there is nothing to read."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import pytest
from datasets.exceptions import DatasetNotFoundError
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub.errors import HFValidationError

from lumiere.config.schema import DatasetConfig
from lumiere.data import hub
from lumiere.data.corpus import TextFiles, find_source, joined, load_rows
from lumiere.data.hub import hub_reachable
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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "getproxies", dict)


def rows(**settings: Any) -> dict[str, list[str]]:
    """Return the rows of each split; for plain text the documents."""

    def texts(found: Iterable[str]) -> Iterable[str]:
        return joined(found.parts()) if isinstance(found, TextFiles) else found

    return {split: list(texts(found)) for split, found in load_rows(DatasetConfig(**settings))[0].items()}


def refusal(**settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load_rows(DatasetConfig(**settings))
    assert caught.value.hint
    return caught.value


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        ({"a.csv": "text,body\na,b\n"}, {"name": "csv", "data_files": "a.csv", "text_column": "body"},
         {"train": ["b"]}),
        ({"a.json": '{"text": "one", "n": 1}\n{"text": null}'}, {"name": "json", "data_files": "a.json"},
         {"train": ["one", ""]}),
        ({"corpus/train.csv": "text\na\n", "corpus/test.csv": "text\nb\n"}, {"name": "corpus"},
         {"train": ["a"], "test": ["b"]}),
        ({"corpus/README.md": SUBSETS, "corpus/small.txt": "a\n", "corpus/large.txt": "a\nb\n"},
         {"name": "./corpus", "subset": "large"}, {"train": ["a\nb\n"]}),
        ({"corpus/README.md": OPTIONS.format("sep: ';'"), "corpus/a.csv": "id;text\n1;a\n"}, {"name": "corpus"},
         {"train": ["a"]}),
    ],
)  # fmt: skip
def test_rows_of_files_and_folders(
    files: dict[str, str], settings: dict[str, Any], expected: dict[str, list[str]]
) -> None:
    write(files)
    assert rows(**settings) == rows(**settings, streaming=True) == expected


def test_subsets_and_options_of_a_readme_are_checked() -> None:
    write({"corpus/README.md": SUBSETS, "corpus/small.txt": "a\n", "corpus/large.txt": "a\nb\n"})
    assert "'small', 'large'" in refusal(name="corpus").message
    missing = refusal(name="corpus", subset="smal")
    assert "'smal'" in missing.message
    assert missing.hint == "--set dataset.subset=small"
    write({"corpus/README.md": OPTIONS.format("skiprows: 1"), "corpus/a.csv": "id;text\n1;a\n"})
    assert "skiprows" in refusal(name="corpus").message


def test_a_file_of_the_same_size_and_time_with_new_content_is_read_again() -> None:
    path, fingerprints = Path("a.csv"), []
    for text in ("first text", "other text", "other text"):
        path.write_text(f"text\n{text}\n")
        os.utime(path, (1, 1))
        loaded, fingerprint = load_rows(DatasetConfig(name="csv", data_files="a.csv"))
        assert list(loaded["train"]) == [text]
        fingerprints.append(fingerprint)
    assert fingerprints[0] != fingerprints[1] == fingerprints[2]


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


def test_downloaded_and_prepared_datasets_are_found_without_a_network(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "datasets--a--b"
    write({f"{folder}/refs/main": "0" * 40, f"{folder}/snapshots/{'0' * 40}/train.csv": "text\nnull\n"})
    assert rows(name="a/b") == {"train": ["null"]}
    datasets.Dataset.from_dict({"text": ["one", None]}).to_parquet("t.parquet")
    assert rows(name="parquet", data_files="t.parquet") == {"train": ["one", ""]}
    Parquet(dataset_name="c", hash="0", data_files={"train": ["t.parquet"]}).download_and_prepare()
    # As if it came from the Hub.
    [prepared] = (tmp_path / "datasets" / "c").iterdir()
    prepared.rename(prepared.with_name("default"))
    prepared.parent.rename(tmp_path / "datasets" / "a___c")
    assert rows(name="a/c") == rows(name="a/c", streaming=True) == {"train": ["one", ""]}


@pytest.mark.parametrize(
    ("settings", "named", "hint"),
    [
        ({"name": "text"}, "dataset.data_files", "--set dataset.data_files=book.txt"),
        ({"name": "text", "data_files": []}, "dataset.data_files", "--set dataset.data_files=book.txt"),
        ({"name": "csv", "data_files": {"train": "no.csv"}}, "'no.csv'", "relative paths"),
        ({"name": "./no"}, "'./no'", "dataset.name"),
        ({"name": "/no/folder"}, "'/no/folder'", "dataset.name"),
        ({"name": "~/no-such-folder"}, "'~/no-such-folder'", "dataset.name"),
        ({"name": "empty"}, "none", ".txt"),
        ({"name": "a.txt"}, "'a.txt'", "dataset.name=text --set dataset.data_files=a.txt"),
        ({"name": "t.csv"}, "'t.csv'", "dataset.name=csv --set dataset.data_files=t.csv"),
        ({"name": "csv", "data_files": "t.csv"}, "it has n, txet", "dataset.text_column=txet"),
        ({"name": "someone/something"}, "someone/something", "lumiere train tiny"),
        ({"name": "x" * 5000}, "xxx", "lumiere train tiny"),
        ({"name": "a\0b"}, "a\\x00b", "lumiere train tiny"),
    ],
)
def test_rejected_datasets(
    settings: dict[str, Any],
    named: str,
    hint: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The library's own handler holds on to the stderr of its import.
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [caplog.handler])
    write({"t.csv": "n,txet\n1,a\n", "a.txt": "a"})
    Path("empty").mkdir()
    error = refusal(**settings)
    assert named in error.message
    assert hint in (error.hint or "")
    assert "\n" not in error.message
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_wikitext_without_the_raw_subset(wikitext: Path) -> None:
    error = refusal(name=str(wikitext), subset="wikitext-2-raw-v1")
    assert "'wikitext-2-raw-v1'" in error.message
    assert error.hint == "--set dataset.subset=wikitext-2-v1"


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "exists neither"),
        (HFValidationError("Repo id must be"), "exists neither"),
        (ConnectionError("x" * 1000), "xxx"),
        (KeyError(), "KeyError"),
    ],
)
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, raised: Exception, reason: str) -> None:
    def load_dataset_builder(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    error = refusal(name="a/b")
    assert "'a/b'" in error.message
    assert reason in error.message
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
    refusal(name="someone/something")
    assert asked
    # The process now reads only its cache, without waiting for the network.
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


def test_without_a_network_there_is_one_error_with_a_hint(tmp_path: Path) -> None:
    """In a subprocess, to see everything that the libraries print."""
    code = (
        "from lumiere.config.loader import load_config\n"
        "from lumiere.data.corpus import load_corpus\n"
        "from lumiere.errors import DataError\n"
        "try:\n    load_corpus(load_config('small').dataset)\n"
        "except DataError as error:\n    print(error.message, error.hint, sep='\\n')\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {"HF_ENDPOINT": UNREACHABLE, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=PROJECT, capture_output=True, text=True, check=True
    )
    message, hint = run.stdout.splitlines()
    assert "Salesforce/wikitext" in message
    assert "--set dataset.name=" in hint
    assert run.stderr == ""
