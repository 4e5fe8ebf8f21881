"""The exported form compared with numpy, without TransformerLens."""

from typing import Any

import numpy as np
import pytest
import torch

from lumiere.errors import LumiereError
from lumiere.export.transformer_lens import bridge_config, bridge_logits, bridge_weights, neighboring_pairs
from tests import reference
from tests.export.conftest import make_model
from tests.models.build import VARIANTS

TOKENS_BT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 30, 5, 8], [27, 18, 28, 18, 28, 4, 5, 9, 4, 5, 23, 5]])
SIZES = {"n_layers": 2, "d_model": 8, "n_ctx": 12, "d_vocab": 31, "n_heads": 3, "d_head": 6, "d_mlp": 10}
KINDS = {"model_name": "lumiere", "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "eps": 1e-6}
POSITIONS = {
    "learned": {"positional_embedding_type": "standard"},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 6, "rotary_base": 10_000},
}


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_exported_form_computes_what_numpy_computes(positions: str) -> None:
    """Every exported weight has an effect; otherwise the check of an export would miss an error in it."""
    model = make_model(positions=positions).double()
    config, weights = bridge_config(model), bridge_weights(model)
    assert config == SIZES | KINDS | POSITIONS[positions]
    found = bridge_logits(config, weights, TOKENS_BT)
    ours = {name: weight.numpy() for name, weight in model.state_dict().items()}
    for tokens, logits in zip(TOKENS_BT.tolist(), found, strict=True):
        expected, _, _ = reference.transformer(ours, tokens, model.settings)
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-12)
        assert np.abs(expected).max() > 1
    for name, weight in weights.items():
        changed = bridge_logits(config, weights | {name: weight + torch.rand(weight.shape)}, TOKENS_BT)
        # The bias of the keys adds the same to all scores of a query, unless keys are rotated.
        has_effect = not (name.endswith("attn.k.bias") and positions == "learned")
        assert torch.allclose(found, changed, atol=1e-9) != has_effect, name


def test_keys_and_values_need_one_width() -> None:
    with pytest.raises(LumiereError, match="d_key 6 and d_value 5; TransformerLens has one width"):
        bridge_config(make_model(d_value=5))


@pytest.mark.parametrize("variant", list(VARIANTS.values())[2:])
def test_what_the_format_cannot_hold_is_refused_by_name(variant: dict[str, Any]) -> None:
    with pytest.raises(LumiereError) as caught:
        bridge_config(make_model(**({"d_key": 8, "d_value": 8} | variant)))
    assert any(f"has {name} " in caught.value.message for name in variant)


def test_rotary_pairs_become_neighbors() -> None:
    """Two heads of width 6: pairs are (0, 3), (1, 4), (2, 5)."""
    order = neighboring_pairs(torch.arange(12.0)[:, None], num_heads=2)[:, 0]
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_names_are_those_of_its_state_dict() -> None:
    ends = {"embed.weight", "pos_embed.weight", "ln_final.weight", "unembed.weight", "unembed.bias"}
    parts = {f"attn.{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")}
    parts |= {"ln1.weight", "ln2.weight", "mlp.gate.weight", "mlp.in.weight", "mlp.out.weight"}
    blocks = {f"blocks.{layer}.{part}" for layer in range(2) for part in parts}
    assert set(bridge_weights(make_model())) == ends | blocks
    assert set(bridge_weights(make_model(positions="rotary"))) == (ends | blocks) - {"pos_embed.weight"}
