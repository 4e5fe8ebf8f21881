"""The exported form compared with numpy, without TransformerLens."""

from typing import Any

import numpy as np
import pytest
import torch

from lumiere.errors import LumiereError
from lumiere.export.transformer_lens import bridge_config, bridge_logits, bridge_weights, neighboring_pairs
from tests import reference
from tests.export.conftest import HELD, make_model
from tests.models.build import ROTARY

TOKENS_BT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 30, 5, 8], [27, 18, 28, 18, 28, 4, 5, 9, 4, 5, 23, 5]])
SIZES = {"n_layers": 2, "d_model": 8, "n_ctx": 12, "d_vocab": 31, "n_heads": 3, "d_head": 6, "d_mlp": 10}
KINDS = {"model_name": "lumiere", "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "eps": 1e-6}
POSITIONS = {
    "learned": {"positional_embedding_type": "standard"},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 6, "rotary_base": 10_000},
}


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_config_has_the_names_of_transformer_lens(positions: str) -> None:
    assert bridge_config(make_model(positions=positions)) == SIZES | KINDS | POSITIONS[positions]


@pytest.mark.parametrize("name", HELD)
def test_the_exported_form_computes_what_numpy_computes(name: str) -> None:
    """Every exported weight has an effect; otherwise the check of an export would miss an error in it."""
    model = make_model(**HELD[name]).double()
    config, weights = bridge_config(model), bridge_weights(model)
    found = bridge_logits(config, weights, TOKENS_BT)
    ours = {name: weight.numpy() for name, weight in model.state_dict().items()}
    for tokens, logits in zip(TOKENS_BT.tolist(), found, strict=True):
        expected, _, _ = reference.transformer(ours, tokens, model.settings)
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-12)
        assert np.abs(expected).max() > 1
    for name, weight in weights.items():
        changed = bridge_logits(config, weights | {name: weight + torch.rand(weight.shape)}, TOKENS_BT)
        # The bias of the keys adds the same to all scores of a query, unless keys are rotated.
        has_effect = not (name.endswith("attn.k.bias") and not model.settings.rotary_size)
        assert torch.allclose(found, changed, atol=1e-9) != has_effect, name


def test_keys_and_values_need_one_width() -> None:
    with pytest.raises(LumiereError, match="d_key 6 and d_value 5; TransformerLens has one width"):
        bridge_config(make_model(d_value=5))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_windows": [None, 3]}, "attention_windows [None, 3]"),
        ({"parallel_blocks": True}, "parallel_blocks True"),
        ({"query_key_norm": True}, "query_key_norm True"),
        ({"attention_scale": 1.0}, "attention_scale 1.0"),
        ({"bias": "all"}, "bias 'all'"),
        (ROTARY | {"rotary_base": 10.5}, "rotary_base 10.5"),
    ],
)
def test_what_the_library_lacks_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LumiereError) as caught:
        bridge_config(make_model(**changes))
    assert f"has {named}," in caught.value.message


def test_windows_that_hide_nothing_are_exported() -> None:
    assert bridge_config(make_model(attention_windows=[None, 12])) == bridge_config(make_model())


def test_rotary_pairs_become_neighbors() -> None:
    """Two heads of width 6: pairs are (0, 3), (1, 4), (2, 5); of the first four numbers, (0, 2) and (1, 3)."""
    assert neighboring_pairs(torch.arange(12.0), 6, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    order = neighboring_pairs(torch.arange(12.0)[:, None], 6, 4)[:, 0]
    assert order.tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


def test_names_are_those_of_its_state_dict() -> None:
    ends = {"embed.weight", "pos_embed.weight", "ln_final.weight", "unembed.weight", "unembed.bias"}
    parts = {f"attn.{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")}
    parts |= {"ln1.weight", "ln2.weight", "mlp.gate.weight", "mlp.in.weight", "mlp.out.weight"}
    blocks = {f"blocks.{layer}.{part}" for layer in range(2) for part in parts}
    assert set(bridge_weights(make_model())) == ends | blocks
    assert set(bridge_weights(make_model(positions="rotary"))) == (ends | blocks) - {"pos_embed.weight"}
