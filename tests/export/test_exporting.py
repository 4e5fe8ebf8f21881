"""A folder for TransformerLens: whole and right, or not there."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save

from lumiere.errors import FailedCheckError, LumiereError
from lumiere.export import transformer_lens
from lumiere.export.exporting import Exported, Target, export_model, find_target
from lumiere.export.transformer_lens import logits_receipt, stated_tokens
from lumiere.models.transformer import Transformer

MakeModel = Callable[..., Transformer]
FILES = ["README.md", "config.json", "expected.safetensors", "load.py", "model.safetensors", "tokenizer.json"]
TARGET = find_target("transformer-lens")

pytestmark = pytest.mark.usefixtures("without_transformer_lens")


def export(model: Transformer, target: Target = TARGET) -> Exported:
    return export_model(target, Path("out"), model, b'{"made": "up"}', range(3, 31), {"run": "run_x", "step": 7})


def test_the_folder_holds_all_that_it_takes(make_model: MakeModel) -> None:
    model = make_model()
    exported = export(model)
    assert sorted(os.listdir("out")) == sorted(exported.files) == FILES
    expected = load_file("out/expected.safetensors")
    assert expected["tokens"].tolist() == [list(exported.tokens)]
    assert len(exported.tokens) == 12
    with torch.no_grad():
        torch.testing.assert_close(expected["logits"], model.logits(expected["tokens"]))
    weights = load_file("out/model.safetensors")
    assert torch.equal(weights["embed.weight"], model.token_embedding.weight)
    assert torch.equal(weights["unembed.weight"], model.token_embedding.weight)
    assert json.loads(Path("out/config.json").read_text())["d_head"] == 6
    assert Path("out/tokenizer.json").read_bytes() == b'{"made": "up"}'
    readme = Path("out/README.md").read_text()
    assert "run: `run_x`" in readme
    assert " ".join(map(str, exported.tokens)) in readme
    compile(Path("out/load.py").read_text(), "load.py", "exec")


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_receipt_compares_what_was_written(positions: str, make_model: MakeModel) -> None:
    exported = export(make_model(positions=positions))
    (receipt,) = exported.receipts
    assert receipt.holds
    assert 0 < receipt.error < 1e-12
    assert exported.skipped == 1


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "blocks.1.mlp.in.weight"),
        ("model.safetensors", "blocks.0.attn.o.bias"),
        ("model.safetensors", "pos_embed.weight"),
        ("config.json", "eps"),
        ("config.json", "n_heads"),
    ],
)
def test_a_folder_that_computes_something_else_is_not_written(
    file: str, name: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight off by 1e-5 at its last place; another epsilon; other heads of the same width in all."""

    def spoilt(*arguments: Any) -> dict[str, bytes]:
        files = TARGET.files(*arguments)
        if file == "config.json":
            wrong = {"eps": {"eps": 1e-5}, "n_heads": {"n_heads": 2, "d_head": 9}}[name]
            return files | {file: json.dumps(json.loads(files[file]) | wrong).encode()}
        weights = load(files[file])
        weights[name].flatten()[-1] += 1e-5
        return files | {file: save(weights)}

    with pytest.raises(FailedCheckError, match=r"error .* nothing written"):
        export(make_model(), target=replace(TARGET, files=spoilt))
    assert os.listdir() == []


def test_logits_that_are_no_numbers_are_not_written(make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(FailedCheckError, match="error nan"):
        export(model)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("version", "code", "output", "error", "message"),
    [
        ("4.3.0", 0, "Moving model to cpu\n3e-07\n", "", None),
        ("4.3.0", 0, "2e-04\n", "", "the same logits in TransformerLens 4.3.0 .float32.: error 2e-04"),
        ("4.3.0", 0, "nan\n", "", "error nan"),
        ("4.9.1", 1, "", "Traceback\nRuntimeError: no \x1b[31m key\n", r"4.9.1 cannot boot the model: RuntimeError"),
        ("4.9.1", -9, "", "", "cannot boot the model: it says nothing"),
    ],
)
def test_where_the_library_is_installed_it_decides(
    version: str,
    code: int,
    output: str,
    error: str,
    message: str | None,
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(sorted(os.listdir(cwd)))
        return subprocess.CompletedProcess(command, code, output, error)

    monkeypatch.setattr(transformer_lens, "installed_version", lambda: version)
    monkeypatch.setattr(transformer_lens.subprocess, "run", run)
    if message is None:
        exported = export(make_model())
        assert [receipt.error for receipt in exported.receipts][1:] == [3e-7]
        assert exported.skipped == 0
    else:
        with pytest.raises(FailedCheckError, match=message) as caught:
            export(make_model())
        assert str(caught.value).isprintable()
        assert os.listdir() == []
    assert seen == [FILES], "it sees the folder as it will be"


def test_a_version_without_boot_native_is_left_alone(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_lens, "installed_version", lambda: "2.18.0")
    assert export(make_model()).skipped == 1


def test_targets_that_are_misspelt() -> None:
    with pytest.raises(LumiereError, match=r"export to 'transformerlens' .did you mean transformer-lens"):
        find_target("transformerlens")
    with pytest.raises(LumiereError, match="it exports to transformer-lens"):
        find_target("onnx")


def test_stated_tokens() -> None:
    assert torch.equal(stated_tokens(12, range(3, 31)), stated_tokens(12, range(3, 31)))
    tokens_BT = stated_tokens(1024, range(3, 6))
    assert tokens_BT.shape == (1, 256)
    assert set(tokens_BT[0].tolist()) == {3, 4, 5}


def test_differences_are_relative_to_the_largest_logit() -> None:
    expected = torch.tensor([[[50.0, -100.0]]])
    assert logits_receipt("law", expected + 1, expected, 0.1).error == pytest.approx(0.01)
    assert logits_receipt("law", expected / 1e3 + 1, expected / 1e3, 0.1).error == pytest.approx(1)
    assert not logits_receipt("law", expected[:, :, :1], expected, 0.1).holds
