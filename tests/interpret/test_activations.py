"""Activations by name against the model's own output, and the names that match a pattern."""

import numpy as np
import pytest
import torch

from lumiere.components.hooks import HookPoint, hook_points, matching_names, run_with_cache
from lumiere.errors import LumiereError
from lumiere.interpret.activations import activations
from lumiere.models.transformer import Transformer
from tests.interpret.models import TOKENS, random_model

LENGTHS = {"T": 10, "S": 10, "E": 12, "H": 2, "K": 6, "V": 7, "F": 9, "1": 1}
"""Of the random models."""


def test_every_hook_point_is_there_in_the_order_of_the_computation(model: Transformer) -> None:
    result = activations(model, TOKENS)
    assert sorted(result.names) == sorted(hook_points(model))
    assert result.names[0] == "hook_embed"
    assert result.names[-1] == "ln_final.hook_normalized"
    layers = [int(name.split(".")[1]) for name in result.names if name.startswith("blocks")]
    assert layers == sorted(layers)
    with torch.no_grad():
        _, cache = run_with_cache(model, torch.tensor([TOKENS]))
    assert all(np.array_equal(value, cache[name][0].numpy()) for name, value in result.values.items())


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_axes_are_those_of_the_shapes(positions: str) -> None:
    result = activations(random_model(positions=positions), TOKENS)
    for name, axes, shape, size in zip(result.names, result.axes, result.shapes, result.num_bytes, strict=True):
        assert shape == tuple(LENGTHS[axis] for axis in axes.split()), name
        assert result.values[name].shape == shape
        assert size == 4 * np.prod(shape)
    last = list(result.rows())[-1]
    assert last == {"name": "ln_final.hook_normalized", "axes": "T E", "shape": "10 12", "num_bytes": 480}


def test_receipts_show_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    right = model.logits
    monkeypatch.setattr(model, "logits", lambda tokens: right(tokens) + 1)
    added, watched = activations(model, TOKENS).receipts
    assert added.holds
    assert not watched.holds
    monkeypatch.undo()
    # The block adds twice what its hook point sees.
    monkeypatch.setattr(model.blocks[0], "hook_attn_out", Doubling())
    added, _ = activations(model, TOKENS).receipts
    assert not added.holds


class Doubling(HookPoint):
    """A hook point that does not pass on what it shows."""

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(activation)


def test_only_what_is_named_is_kept() -> None:
    model = random_model()
    result = activations(model, TOKENS, ["blocks.[02].attn.hook_?", "ln_final.hook_scale", "blocks.0.attn.hook_q"])
    expected = [f"blocks.{layer}.attn.hook_{leaf}" for layer in (0, 2) for leaf in "qkvz"]
    assert list(result.names) == [*expected, "ln_final.hook_scale"]
    assert list(result.arrays()) == list(result.names)
    everything = activations(model, TOKENS)
    assert all(np.array_equal(value, everything.values[name]) for name, value in result.values.items())
    assert "values" not in result.as_dict()


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("blocks.1.hook_resid_poste", "did you mean blocks.1.hook_resid_post?"),
        ("blocks.*.attn.hook_patern", "did you mean blocks.0.attn.hook_pattern?"),
        ("pattern", r"did you mean \*pattern\*?"),
        ("Q9", "lists all names"),
    ],
)
def test_names_that_do_not_exist(pattern: str, hint: str) -> None:
    with pytest.raises(LumiereError, match=hint):
        matching_names(random_model(), ["*", pattern])
