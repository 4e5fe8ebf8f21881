"""An exported folder is complete and correct, or does not exist."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save

from lumiere.errors import FailedCheckError, LumiereError
from lumiere.export import transformer_lens
from lumiere.export.exporting import TARGETS, Exported, Target, check_folder, export_model, new_folder
from lumiere.export.original import Original, need, sample_tokens
from tests.export.conftest import TOKENIZER, make_original

FILES = ["README.md", "config.json", "expected.safetensors", "load.py", "model.safetensors", "tokenizer.json"]
TARGET = TARGETS["transformer-lens"]

pytestmark = pytest.mark.usefixtures("without_transformer_lens")


def export(original: Original, target: Target = TARGET) -> Exported:
    return export_model(target, Path("out"), original)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_folder_is_complete_and_checked(positions: str) -> None:
    original = make_original(positions=positions)
    model, tokens = original.model, original.sample
    exported = export(original)
    assert sorted(os.listdir("out")) == sorted(exported.files) == FILES
    (receipt,) = exported.receipts
    assert receipt.holds
    assert 0 < receipt.error < 1e-12
    assert len(exported.notes) == 1
    expected = load_file("out/expected.safetensors")
    assert torch.equal(expected["tokens"], tokens)
    assert tokens.shape == (1, 12)
    with torch.no_grad():
        torch.testing.assert_close(expected["logits"], model.logits(expected["tokens"]))
    assert torch.equal(load_file("out/model.safetensors")["unembed.weight"], model.token_embedding.weight)
    assert json.loads(Path("out/config.json").read_text())["d_head"] == 6
    assert Path("out/tokenizer.json").read_text() == TOKENIZER.to_json()
    readme = Path("out/README.md").read_text()
    assert "run: `run_x`" in readme
    assert " ".join(map(str, tokens[0].tolist())) in readme
    compile(Path("out/load.py").read_text(), "load.py", "exec")


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
def test_a_folder_that_computes_other_logits_is_not_written(file: str, name: str) -> None:
    """The last value of a weight is wrong by 1e-5; another epsilon; other heads of the same total width."""

    def corrupt(folder: Path, original: Original) -> None:
        TARGET.write(folder, original)
        data = (folder / file).read_bytes()
        if file == "config.json":
            wrong = {"eps": {"eps": 1e-5}, "n_heads": {"n_heads": 2, "d_head": 9}}[name]
            data = json.dumps(json.loads(data) | wrong).encode()
        else:
            weights = load(data)
            weights[name].flatten()[-1] += 1e-5
            data = save(weights)
        (folder / file).write_bytes(data)

    with pytest.raises(FailedCheckError, match=r"error .* nothing written"):
        export(make_original(), target=replace(TARGET, write=corrupt))
    assert os.listdir() == []


def test_nan_logits_are_not_written() -> None:
    original = make_original()
    with torch.no_grad():
        original.model.get_parameter("final_norm.weight")[0] = torch.nan
    with pytest.raises(FailedCheckError, match="error nan"):
        export(original)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("version", "code", "output", "error", "expected"),
    [
        ("4.3.0", 0, "Moving model to cpu\n3e-07\n", "", 3e-7),
        ("4.3.0", 0, "2e-04\n", "", "the same logits in TransformerLens 4.3.0 .float32.: error 2e-04"),
        ("4.3.0", 0, "nan\n", "", "error nan"),
        ("4.9.1", 1, "", "Traceback\nRuntimeError: no \x1b[31m key\n", "4.9.1 cannot boot the model: RuntimeError"),
        ("4.9.1", -9, "", "", "cannot boot the model: no error message"),
        ("2.18.0", 1, "", "", None),  # it has no boot_native, so it is not started
    ],
)
def test_an_installed_library_decides(
    version: str,
    code: int,
    output: str,
    error: str,
    expected: float | str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(sorted(os.listdir(cwd)))
        return subprocess.CompletedProcess(command, code, output, error)

    monkeypatch.setattr(transformer_lens, "installed_version", lambda: version)
    monkeypatch.setattr(transformer_lens.subprocess, "run", run)
    if isinstance(expected, str):
        with pytest.raises(FailedCheckError, match=expected) as caught:
            export(make_original())
        assert str(caught.value).isprintable()
        assert os.listdir() == []
    else:
        exported = export(make_original())
        assert [receipt.error for receipt in exported.receipts[1:]] == ([] if expected is None else [expected])
        assert len(exported.notes) == (expected is None)
    assert seen == ([] if expected is None else [FILES]), "the library sees the final folder"


def test_sample_tokens_are_fixed() -> None:
    assert torch.equal(sample_tokens(12, range(3, 31)), sample_tokens(12, range(3, 31)))
    tokens_BT = sample_tokens(1024, range(3, 6))
    assert tokens_BT.shape == (1, 256)
    assert set(tokens_BT[0].tolist()) == {3, 4, 5}


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("exists", [False, True])
def test_a_new_folder_appears_completely_or_not_at_all(exists: bool, error: Any) -> None:
    if exists:
        Path("out").mkdir()

    def fill() -> None:
        with new_folder(Path("out")) as staging:
            (staging / "a.txt").write_bytes(b"one")
            assert not Path("out").exists() or not contents("out")
            if error is not None:
                raise error

    if error is None:
        fill()
        assert contents("out") == {"a.txt": b"one"}
    else:
        with pytest.raises(LumiereError if isinstance(error, OSError) else error):
            fill()
        assert not exists or not contents("out")
    assert os.listdir() == ["out"] * (exists or error is None)


def test_a_file_that_appears_meanwhile_is_kept() -> None:
    Path("out").mkdir()
    with pytest.raises(LumiereError, match="'out' cannot be written"), new_folder(Path("out")):
        Path("out/mine.txt").write_text("mine")
    assert contents("out") == {"mine.txt": b"mine"}
    assert os.listdir() == ["out"]


@pytest.mark.parametrize("path", ["full", "file", "link", "none/out", ".", "full/.."])
def test_other_paths_are_refused(path: str) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    before = sorted(os.listdir())
    named = f"'{path.removesuffix('/out')}'"
    with pytest.raises(LumiereError, match=named):
        check_folder(Path(path))
    with pytest.raises(LumiereError, match=named), new_folder(Path(path)):
        raise AssertionError("the block must not be entered")
    assert sorted(os.listdir()) == before
    assert contents("full") == {"mine.txt": b"mine"}


def test_packages_that_are_not_there_are_named() -> None:
    need("hf", "torch", "numpy>=2.0")
    with pytest.raises(LumiereError, match=r"nowhere>=1\.0, which is not installed") as caught:
        need("hf", "torch", "nowhere>=1.0")
    assert "pip install 'nowhere>=1.0'" in (caught.value.hint or "")
