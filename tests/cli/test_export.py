"""`lumiere export`: what it prints, what it refuses, and its exit codes."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lumiere import __version__
from lumiere.cli import app
from lumiere.export import exporting, transformer_lens
from lumiere.interpret.result import Receipt
from lumiere.persistence.checkpoint import hash_tensors
from lumiere.persistence.runs import Run

FILES = ["README.md", "config.json", "expected.safetensors", "load.py", "model.safetensors", "tokenizer.json"]


@pytest.fixture(autouse=True)
def without_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_lens, "installed_version", lambda: None)


def export(run: Run, *arguments: str, to: str = "transformer-lens") -> Result:
    return CliRunner().invoke(app, ["export", "--runs-dir", str(run.path.parent), "--to", to, *arguments])


def test_what_it_prints(trained_run: Run) -> None:
    result = export(trained_run, "latest", "out")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert sorted(lines[:6]) == [str(Path("out") / name) for name in FILES]
    assert lines[6].startswith("receipt: the folder's weights give the model's logits (float64), error ")
    assert "transformer-lens is not installed" in result.stderr
    assert sorted(os.listdir("out")) == FILES
    assert trained_run.name in Path("out/README.md").read_text()


def test_json(trained_run: Run) -> None:
    result = export(trained_run, trained_run.id, "out", "--checkpoint", "latest", "--json")
    shown = json.loads(result.stdout)
    keys = ["checkpoint", "files", "folder", "lumiere_version", "receipts", "run", "step", "to", "token_ids"]
    assert sorted(shown) == [*keys, "weights_sha256"]
    assert (shown["run"], shown["checkpoint"], shown["step"]) == (trained_run.name, "latest", 12)
    assert (shown["lumiere_version"], shown["to"], shown["folder"]) == (__version__, "transformer-lens", "out")
    assert shown["weights_sha256"] == hash_tensors(trained_run.load_model("latest").state_dict())
    assert sorted(shown["files"]) == FILES
    assert len(shown["token_ids"]) == 16
    assert [receipt["holds"] for receipt in shown["receipts"]] == [True]


def test_the_tokenizer_is_the_runs_own(trained_run: Run) -> None:
    from lumiere.data.tokenizer import Tokenizer

    export(trained_run, "latest", "out")
    assert Tokenizer.load(Path("out/tokenizer.json")).fingerprint == trained_run.load_tokenizer().fingerprint


@pytest.mark.parametrize(
    ("run", "folder", "options", "message"),
    [
        ("latest", "full", [], "error: the folder 'full' is not empty"),
        ("latest", "full/mine.txt", [], "error: 'full/mine.txt' exists and is not a folder"),
        ("latest", "none/out", [], "error: the folder 'none' does not exist"),
        ("latest", ".", [], "error: '.' is the current folder"),
        ("zzzzzzzz", "out", [], "error: no run 'zzzzzzzz'"),
        ("latest", "out", ["--checkpoint", "bset"], "error: "),
    ],
)
def test_bad_input_is_refused(trained_run: Run, run: str, folder: str, options: list[str], message: str) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    result = export(trained_run, run, folder, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 2
    assert os.listdir() == ["full"]
    assert os.listdir("full") == ["mine.txt"]


def test_a_library_that_is_misspelt(trained_run: Run) -> None:
    result = export(trained_run, "latest", "out", to="transformers-lens")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[1] == "hint: did you mean transformer-lens?"


def test_other_logits_exit_with_3_and_write_nothing(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    target = exporting.TARGETS["transformer-lens"]
    wrong = exporting.Target(target.files, (lambda folder, model: Receipt("the same logits", 0.5, 1e-4),))
    monkeypatch.setattr(exporting, "TARGETS", {"transformer-lens": wrong})
    result = export(trained_run, "latest", "out")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.splitlines()[0] == "error: the same logits: error 5e-01 (tolerance 1e-04), nothing written"
    assert os.listdir() == []
