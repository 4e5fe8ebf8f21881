"""Runs on own files: from another folder, after the files have changed, and after they are gone."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lumiere.persistence.runs import RunStore
from tests.cli.commands import invoke, read_json, refuse
from tests.conftest import TINY

DATASET = {"name": "csv", "data_files": "texts.csv", "sliding_window_size": 2, "validation_fraction": 0.5}
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
    values = TINY | {"dataset": DATASET, "training": {"batch_size": 4, "max_steps": 2, "snapshots": False}}
    (home / "own.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return home


@pytest.mark.slow
def test_a_run_works_from_another_folder_whatever_becomes_of_the_file(home: Path, tmp_path: Path) -> None:
    """While the tokenized corpus is in the cache; without it, the file must be the one that the run was trained on."""
    invoke("train", "own.yaml")
    file, run = home / "texts.csv", RunStore(tmp_path / "runs").open("latest")
    dataset = run.load_config().dataset
    assert dataset.data_files == str(file)
    assert len(str(dataset.data_sha256)) == 64
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for number, happens in enumerate((file.exists, lambda: file.write_text("text\nanother\ntext\n"), file.unlink)):
            happens()
            assert read_json("eval", run.id)["num_tokens"] > 0
            invoke("inspect", "ablate", "--run", run.id, "--json")
            invoke("train", "--resume", run.id, "--set", f"training.max_steps={3 + number}")
            assert read_json("train", str(run.config_path))["run"] != run.id
        for happens in (lambda: shutil.rmtree(tmp_path / "cache"), lambda: file.write_text("text\nanother\ntext\n")):
            happens()
            refuse("eval", run.id)
            refuse("train", "--resume", run.id, "--set", "training.max_steps=9")
        invoke("train", str(run.config_path), "--set", "dataset.data_sha256=null")


@pytest.mark.usefixtures("home")
def test_empty_rows_are_counted_and_words_are_kept() -> None:
    result = invoke("tokenize", "own.yaml", "--json")
    assert sum(split["documents"] for split in json.loads(result.stdout)["splits"].values()) == 5
    assert "2 of 7 rows" in result.stderr


def test_a_folder_is_recorded_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "corpus").mkdir()
    (home / "texts.csv").rename(home / "corpus" / "train.csv")
    (home / "corpus" / "valid.csv").write_text("text\nthe cat\n")
    invoke("train", "own.yaml", "--set", "dataset.name=corpus", "--set", "dataset.data_files=null")
    monkeypatch.chdir(tmp_path)
    run = RunStore().open("latest")
    assert run.load_config().dataset.name == str(home / "corpus")
    assert run.record.splits["validation"]["num_documents"] == 1
    shutil.rmtree(home / "corpus")
    invoke("eval", run.id, "--json")
