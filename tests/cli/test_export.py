"""`lumiere export`: what it prints, what it refuses, and its exit codes."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import Result

from lumiere import __version__
from lumiere.data.tokenizer import Tokenizer
from lumiere.export import exporting, transformer_lens
from lumiere.interpret.result import Receipt
from lumiere.persistence.runs import Run
from lumiere.persistence.tensor_files import hash_tensors
from tests.cli.commands import invoke

FILES = ["README.md", "config.json", "expected.safetensors", "load.py", "model.safetensors", "tokenizer.json"]


@pytest.fixture(autouse=True)
def without_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_lens, "installed_version", lambda: None)


def export(*arguments: str, to: str = "transformer-lens", code: int = 0) -> Result:
    return invoke("export", "--to", to, *arguments, code=code)


def test_what_it_prints(run: Run) -> None:
    result = export("latest", "out")
    lines = result.stdout.splitlines()
    assert sorted(lines[:6]) == [str(Path("out") / name) for name in FILES]
    assert lines[6].startswith("receipt: the folder's weights give the model's logits (float64), error ")
    assert "transformer-lens is not installed" in result.stderr
    assert sorted(os.listdir("out")) == FILES
    assert run.name in Path("out/README.md").read_text()


def test_a_folder_for_transformers_has_the_model_card(run: Run) -> None:
    result = export("latest", "out", to="hf")
    receipts = [line for line in result.stdout.splitlines() if line.startswith("receipt: ")]
    assert len(receipts) == 6
    card = Path("out/README.md").read_text()
    assert "library_name: transformers" in card.split("---")[1]
    assert f"# Lumiere {run.id}" in card
    assert "trust_remote_code=True" in card
    values = json.loads(Path("out/tokenizer.json").read_text())
    assert values["model"] == json.loads(run.tokenizer_path.read_text())["model"]


def test_json(run: Run) -> None:
    result = export(run.id, "out", "--checkpoint", "latest", "--json")
    shown = json.loads(result.stdout)
    keys = ["checkpoint", "files", "folder", "lumiere_version", "receipts", "run", "step", "to", "token_ids"]
    assert sorted(shown) == [*keys, "weights_sha256"]
    assert (shown["run"], shown["checkpoint"], shown["step"]) == (run.name, "latest", 12)
    assert (shown["lumiere_version"], shown["to"], shown["folder"]) == (__version__, "transformer-lens", "out")
    assert shown["weights_sha256"] == hash_tensors(run.load_model("latest").state_dict())
    assert sorted(shown["files"]) == FILES
    assert len(shown["token_ids"]) == 16
    assert [receipt["holds"] for receipt in shown["receipts"]] == [True]

    assert Tokenizer.load(Path("out/tokenizer.json")).fingerprint == run.load_tokenizer().fingerprint


def test_other_logits_exit_with_3_and_write_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    target = exporting.TARGETS["transformer-lens"]
    wrong = exporting.Target(target.write, lambda folder, original: [Receipt("the same logits", 0.5, 1e-4)])
    monkeypatch.setattr(exporting, "TARGETS", {"transformer-lens": wrong})
    result = export("latest", "out", code=3)
    assert result.stdout == ""
    assert result.stderr.splitlines()[0] == "error: the same logits: error 5e-01 (tolerance 1e-04), nothing written"
    assert os.listdir() == ["runs"]
