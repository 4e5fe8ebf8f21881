"""`lumiere inspect cache`: the list, the file of values, and what it refuses."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from lumiere.components.hooks import hook_points, run_with_cache
from lumiere.persistence.runs import Run
from tests.cli.inspect.commands import inspect, inspect_json

pytestmark = pytest.mark.usefixtures("runs_dir")
inspect_cache = partial(inspect, "cache")
shown = partial(inspect_json, "cache")


def test_the_list_names_all_and_no_values(trained_run: Run) -> None:
    result = shown("--prompt", "Once upon")
    assert sorted(result["names"]) == sorted(hook_points(trained_run.load_model("best")))
    length = len(result["token_ids"])
    assert result["shapes"][result["names"].index("blocks.1.attn.hook_pattern")] == [2, length, length]
    assert all(receipt["holds"] for receipt in result["receipts"])
    assert not set(result) & {"values", "hook_embed"}


def test_the_view_is_the_list(trained_run: Run) -> None:
    result = inspect_cache("--prompt", "Once upon", "--names", "*.1.attn.hook_pattern", "--names", "hook_embed")
    length = len(shown("--prompt", "Once upon")["token_ids"])
    lines = [line.split() for line in result.stdout.splitlines()[3:6]]
    pattern_size, embed_size = 4 * 2 * length**2, 4 * length * 16
    assert lines == [
        ["hook_embed", "T", "E", str(length), "x", "16", str(embed_size), "B"],
        ["blocks.1.attn.hook_pattern", "H", "T", "S", "2", *f"x {length} x {length}".split(), str(pattern_size), "B"],
        [],
    ]
    assert "2 activations" in result.stdout


def test_npz_holds_the_values_by_name(trained_run: Run) -> None:
    result = inspect_cache("--prompt", "Once upon", "--names", "blocks.0.*", "-o", "out.npz")
    assert result.exit_code == 0, result.output
    with np.load("out.npz") as saved:
        about = json.loads(str(saved["about"]))
        values = {name: saved[name] for name in saved.files if name != "about"}
    with torch.inference_mode():
        _, cache = run_with_cache(trained_run.load_model("best"), torch.tensor([about["token_ids"]]))
    assert list(values) == [name for name in cache if name.startswith("blocks.0.")] == about["names"]
    assert all(np.array_equal(value, cache[name][0].numpy()) for name, value in values.items())
