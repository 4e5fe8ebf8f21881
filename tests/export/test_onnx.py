"""ONNX files in onnxruntime: every setting (slow), and what a file holds."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lumiere.errors import FailedCheckError
from lumiere.export.exporting import TARGETS, export_model
from lumiere.export.onnx import FILE, Logits
from lumiere.export.original import Original
from lumiere.persistence.runs import Run
from tests.export.conftest import make_model, make_original
from tests.models.build import VARIANTS

TARGET = TARGETS["onnx"]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="pip install onnx onnxscript onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and onnxscript


def test_a_trace_holds_none_of_our_kernels() -> None:
    model = make_model()
    program = torch.export.export(Logits(model), (torch.tensor([[3, 4, 5], [6, 7, 8]]),))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {name.split(".")[0] for name in names} <= {"aten", "<built-in function getitem>"}
    assert any("rms_norm" in name for name in names)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("variant", VARIANTS)
def test_onnxruntime_computes_the_same(variant: str) -> None:
    exported = export_model(TARGET, Path("out"), make_original(**({"d_key": 8} | VARIANTS[variant])))
    assert exported.files == ("README.md", FILE, "tokenizer.json")
    assert all(receipt.error < 1e-5 for receipt in exported.receipts)
    shapes = [receipt.check.partition("shape ")[2] for receipt in exported.receipts]
    assert shapes == ["(1, 12)", "(3, 4)", "(1, 1)"]


@pytest.mark.slow
@needs_onnx
def test_a_file_that_computes_something_else_is_not_left() -> None:
    def corrupt(folder: Path, original: Original) -> None:
        changed = make_original()
        with torch.no_grad():
            changed.model.blocks[0].attention.key.weight[0, 0] += 0.1
        TARGET.write(folder, changed)

    with pytest.raises(FailedCheckError, match=r"onnxruntime .* nothing written"):
        export_model(replace(TARGET, write=corrupt), Path("out"), make_original())
    assert os.listdir() == []


@pytest.mark.slow
@needs_onnx
def test_the_program_in_the_readme_writes_our_greedy_text(trained_run: Run) -> None:
    model, tokenizer = trained_run.load_model("best"), trained_run.load_tokenizer()
    export_model(TARGET, Path("out"), Original(model, tokenizer, {"run": trained_run.name}))
    program = Path("out/README.md").read_text().split("```python\n")[1].split("```")[0]
    program = program.replace("path/to/this/folder", "out").replace("range(20)", "range(2)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = tokenizer.encode("Once upon a time", start=True)
    for _ in range(2):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert done.stdout.rstrip("\n") == tokenizer.decode(ids).rstrip("\n")
