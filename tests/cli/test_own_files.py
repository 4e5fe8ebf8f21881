"""Runs on own files: from another folder, after the files have changed, and after they are gone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lumiere.persistence.runs import Run, RunStore
from tests.cli.commands import invoke, read_json

SMALL = {
    "model": {
        "embedding_size": 8,
        "context_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "d_key": 4,
        "d_value": 4,
        "d_ff": 8,
    },
    "tokenizer": {"vocab_size": 270},
    "dataset": {"name": "csv", "data_files": "texts.csv", "sliding_window_size": 2, "validation_fraction": 0.5},
    "training": {"batch_size": 4, "max_steps": 2, "snapshots": False},
}
ROWS = ["½ of the cat", "null", "", "the cat sat, and sat", "NA", "   ", "the dog ran and ran"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with a CSV file and a config; its cache and its runs are its own."""
    monkeypatch.setenv("LUMIERE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(tmp_path / "runs"))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    (home / "texts.csv").write_text("\n".join(["text", *(f'"{row}"' for row in ROWS)]), encoding="utf-8")
    (home / "own.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on the file, whose working directory has been left."""
    invoke("train", "own.yaml")
    monkeypatch.chdir(tmp_path)
    return RunStore(tmp_path / "runs").open("latest")


def remove(home: Path) -> None:
    (home / "texts.csv").unlink()


def change(home: Path) -> None:
    (home / "texts.csv").write_text("text\nanother\ntext\n")


def test_a_run_records_where_its_files_are_and_what_is_in_them(home: Path, run: Run) -> None:
    dataset = run.load_config().dataset
    assert dataset.data_files == str(home / "texts.csv")
    assert len(str(dataset.data_sha256)) == 64


def test_empty_rows_are_counted_and_words_are_kept(home: Path) -> None:
    result = invoke("tokenize", "own.yaml", "--json")
    assert sum(split["documents"] for split in json.loads(result.stdout)["splits"].values()) == 5
    assert "2 of 7 rows" in result.stderr


def test_commands_work_from_another_folder_whatever_becomes_of_the_file(home: Path, run: Run) -> None:
    for number, happens in enumerate((lambda home: None, change, remove)):
        happens(home)
        assert read_json("eval", run.id)["num_tokens"] > 0
        invoke("inspect", "ablate", "--run", run.id, "--json")
        invoke("inspect", "diff", run.id, run.id, "--json")
        invoke("train", "--resume", run.id, "--set", f"training.max_steps={3 + number}")
        assert read_json("train", str(run.config_path))["run"] != run.id


@pytest.mark.parametrize("happens", [change, remove])
def test_without_the_cache_the_files_are_needed(
    home: Path, run: Run, tmp_path: Path, happens: Callable[[Path], Any]
) -> None:
    happens(home)
    shutil.rmtree(tmp_path / "cache")
    for command in (["eval", run.id], ["train", "--resume", run.id, "--set", "training.max_steps=3"]):
        result = invoke(*command, code=2)
        assert "error:" in result.stderr
    if happens is change:
        invoke("train", str(run.config_path), "--set", "dataset.data_sha256=null")


def test_a_folder_is_recorded_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "corpus").mkdir()
    (home / "texts.csv").rename(home / "corpus" / "train.csv")
    (home / "corpus" / "valid.csv").write_text("text\nthe cat\n")
    invoke("train", "own.yaml", "--set", "dataset.name=corpus", "--set", "dataset.data_files=null")
    monkeypatch.chdir(tmp_path)
    run = RunStore(tmp_path / "runs").open("latest")
    assert run.load_config().dataset.name == str(home / "corpus")
    assert run.record.splits["validation"]["num_documents"] == 1
    shutil.rmtree(home / "corpus")
    invoke("eval", run.id, "--json")
