"""The exported form against the model and against numpy, without TransformerLens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lumiere.errors import LumiereError
from lumiere.export.transformer_lens import bridge_config, bridge_logits, bridge_weights, neighboring_pairs
from lumiere.models.transformer import Transformer
from tests import reference

MakeModel = Callable[..., Transformer]
TOKENS_BT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 30, 5, 8], [27, 18, 28, 18, 28, 4, 5, 9, 4, 5, 23, 5]])
SIZES = {
    "model_name": "lumiere",
    "n_layers": 2,
    "d_model": 8,
    "n_ctx": 12,
    "d_vocab": 31,
    "n_heads": 3,
    "d_head": 6,
    "d_mlp": 10,
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "eps": 1e-6,
}


def logits_of_export(model: Transformer) -> torch.Tensor:
    return bridge_logits(bridge_config(model), bridge_weights(model), TOKENS_BT)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_exported_form_computes_what_numpy_computes(positions: str, make_model: MakeModel) -> None:
    model = make_model(positions=positions).double()
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    for tokens, logits in zip(TOKENS_BT.tolist(), logits_of_export(model), strict=True):
        expected, _, _ = reference.transformer(weights, tokens, num_heads=3, rotary=positions == "rotary")
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-12)
        assert np.abs(expected).max() > 1


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_every_weight_counts(positions: str, make_model: MakeModel) -> None:
    """Were one left out of the equations, a mistake in it would pass the check."""
    model = make_model(positions=positions)
    config, weights = bridge_config(model), bridge_weights(model)
    before = bridge_logits(config, weights, TOKENS_BT)
    for name in weights:
        changed = bridge_logits(config, weights | {name: weights[name] + torch.rand(weights[name].shape)}, TOKENS_BT)
        # The bias of the keys adds the same to all scores of a query, unless the keys turn.
        has_effect = not (name.endswith("attn.k.bias") and positions == "learned")
        assert torch.allclose(before, changed, atol=1e-9) != has_effect, name


def test_the_config_is_that_of_the_bridge(make_model: MakeModel) -> None:
    assert bridge_config(make_model()) == SIZES | {"positional_embedding_type": "standard"}
    rotary: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_dim": 6, "rotary_base": 10_000}
    assert bridge_config(make_model(positions="rotary")) == SIZES | rotary


def test_one_width_for_keys_and_values(make_model: MakeModel) -> None:
    with pytest.raises(LumiereError, match="d_key 6 and d_value 5; TransformerLens has one width"):
        bridge_config(make_model(d_value=5))


def test_pairs_become_neighbors() -> None:
    """Two heads of width 6: pairs are (0, 3), (1, 4), (2, 5)."""
    order = neighboring_pairs(torch.arange(12.0)[:, None], num_heads=2)[:, 0]
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_names_are_those_of_its_state_dict(make_model: MakeModel) -> None:
    ends = {"embed.weight", "pos_embed.weight", "ln_final.weight", "unembed.weight", "unembed.bias"}
    parts = {f"attn.{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")}
    parts |= {"ln1.weight", "ln2.weight", "mlp.gate.weight", "mlp.in.weight", "mlp.out.weight"}
    blocks = {f"blocks.{layer}.{part}" for layer in range(2) for part in parts}
    assert set(bridge_weights(make_model())) == ends | blocks
    assert set(bridge_weights(make_model(positions="rotary"))) == (ends | blocks) - {"pos_embed.weight"}
