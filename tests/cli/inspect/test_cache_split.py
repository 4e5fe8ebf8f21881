"""`lumiere inspect cache --split`, and the same from Python."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lumiere
from lumiere.components.hooks import run_with_cache
from lumiere.errors import LumiereError
from lumiere.persistence.runs import Run
from tests.cli.commands import invoke, read_json


def test_the_split_is_written_and_read(trained_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "activations"
    found = read_json("inspect", "cache", "--split", "validation", "-o", str(folder), "--names", "*.0.attn.hook_z")
    assert found["provenance"]["run"] == trained_run.name
    dataset = lumiere.open_activations(folder, verify=True)
    assert found["num_rows"] == len(dataset)
    run = lumiere.open(trained_run.id)
    windows = run.inspect._target().corpus().windows("validation", run.config)
    batch = next(dataset.batches(batch_size=5))
    tokens, _ = windows.cut(np.array([0]))
    with torch.no_grad():
        _, cache = run_with_cache(run.model, torch.from_numpy(tokens[:, :5]), list(dataset.shapes))
    assert batch["token"].tolist() == tokens[0, :5].tolist()
    torch.testing.assert_close(batch["blocks.0.attn.hook_z"], cache["blocks.0.attn.hook_z"][0])
    again = invoke("inspect", "cache", "--split", "validation", "-o", str(folder), "--names", "*.0.attn.hook_z")
    assert "1 of them there already" in again.stderr
    assert str(folder) in again.stdout.replace("\n", "")


def test_from_python_with_another_split(trained_run: Run, tmp_path: Path) -> None:
    dataset = lumiere.open(trained_run.id).inspect.save_activations(tmp_path / "a", split="train", dtype="float16")
    assert list(dataset.shapes) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert dataset.provenance["split"] == "train"
    with pytest.raises(LumiereError):
        lumiere.open(trained_run.id).inspect.save_activations(tmp_path / "a")
