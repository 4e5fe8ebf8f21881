"""GGUF files: read back by the importer, and executed by llama.cpp (slow)."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lumiere.errors import FailedCheckError, LumiereError
from lumiere.export.exporting import TARGETS, export_model
from lumiere.export.gguf import FILE, neighboring_pairs, write
from lumiere.export.original import Original
from lumiere.importing.gguf import open_model
from tests.export.conftest import make_original
from tests.models.build import ROTARY, VARIANTS

TARGET = TARGETS["gguf"]
HELD: dict[str, dict[str, Any]] = {
    "rotary": ROTARY,
    "untied": ROTARY | {"tie_embeddings": False, "norm_epsilon": 1e-2, "rotary_base": 500.0},
    "grouped, biases": ROTARY | {"num_heads": 6, "num_key_value_heads": 2, "bias": "all"},
    "query biases": ROTARY | {"bias": "qkv"},
}
SCALED = {name: VARIANTS[name] | {"d_key": 8, "d_value": 8} for name in ("slow rotations", "slower rotations")}
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="pip install xllamacpp")


@pytest.mark.parametrize("variant", (HELD | SCALED).values(), ids=HELD | SCALED)
def test_the_importer_reads_the_same_model(variant: dict[str, Any], tmp_path: Path) -> None:
    original = make_original(**variant)
    write(tmp_path, original)
    model = open_model(tmp_path / FILE)
    assert model.settings.rotary_scaling == original.model.settings.rotary_scaling
    found, ours = model.state_dict(), original.model.state_dict()
    assert all(torch.equal(found.pop(name), weight) for name, weight in ours.items())
    assert not any(bias.any() for bias in found.values())


def test_pairs_become_neighbors() -> None:
    """Two heads of width 6: pairs are (0, 3), (1, 4), (2, 5)."""
    order = neighboring_pairs(torch.arange(12.0)[:, None], num_heads=2)[:, 0]
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "positions"),
        (ROTARY | {"norm": "layer"}, "norm"),
        (ROTARY | {"feedforward": "geglu"}, "feedforward"),
        (ROTARY | {"rotary_fraction": 1 / 3}, "rotary_fraction"),
        (ROTARY | {"attention_windows": [None, 3]}, "attention_windows"),
        (ROTARY | {"attention_scale": 1.0}, "attention_scale"),
        (ROTARY | {"parallel_blocks": True}, "parallel_blocks"),
        (ROTARY | {"query_key_norm": True}, "query_key_norm"),
        (ROTARY | {"d_value": 5}, "d_value"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(LumiereError, match=f"has {name} ") as caught:
        write(tmp_path, make_original(**changes))
    assert f"model.{name}=" in (caught.value.hint or "")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("variant", [*HELD, *SCALED])
def test_llama_cpp_computes_the_same(variant: str) -> None:
    exported = export_model(TARGET, Path("out"), make_original(**(HELD | SCALED)[variant]))
    assert exported.files == ("README.md", FILE)
    assert len(exported.receipts) == 3
    assert all(receipt.error < 1e-5 for receipt in exported.receipts)
    assert "NFKC" in exported.notes[0]


@pytest.mark.slow
@needs_llama_cpp
def test_a_file_that_computes_something_else_is_not_left() -> None:
    def corrupt(folder: Path, original: Original) -> None:
        with torch.no_grad():
            original.model.blocks[1].attention.value.weight[-1] += 1e-2
        TARGET.write(folder, original)
        with torch.no_grad():
            original.model.blocks[1].attention.value.weight[-1] -= 1e-2

    with pytest.raises(FailedCheckError, match=r"ten best .* nothing written"):
        export_model(replace(TARGET, write=corrupt), Path("out"), make_original(**ROTARY))
    assert os.listdir() == []


@pytest.mark.slow
@needs_llama_cpp
def test_a_file_that_llama_cpp_cannot_open_is_not_left() -> None:
    def cut(folder: Path, original: Original) -> None:
        TARGET.write(folder, original)
        os.truncate(folder / FILE, 5000)

    with pytest.raises(FailedCheckError, match=r"llama\.cpp cannot run the model"):
        export_model(replace(TARGET, write=cut), Path("out"), make_original(**ROTARY))
    assert os.listdir() == []
