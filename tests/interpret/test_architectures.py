"""Every analysis on every building block: its receipts hold in float64, or it says that it does not apply."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumiere.components.hooks import Hook, hooked
from lumiere.errors import LumiereError
from lumiere.interpret.ablation import ablate
from lumiere.interpret.head_scores import composition_scores
from lumiere.interpret.logit_attribution import logit_attribution
from lumiere.models.transformer import Transformer
from tests.interpret.models import BATCHES, TOKENS, random_model
from tests.interpret.test_laws import ANALYSES
from tests.models.build import EACH_VARIANT, VARIANTS

OF_FEEDFORWARD = ("neurons", "ablate neuron", "ablate feedforward")


def build(variant: dict[str, Any]) -> Transformer:
    """A model in float64 whose biases matter too."""
    model = random_model(**({"num_layers": 2, "d_key": 8} | variant)).double()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5)
    return model


@pytest.fixture(scope="module", params=EACH_VARIANT[2:])
def model(request: pytest.FixtureRequest) -> Transformer:
    return build(VARIANTS[request.param])


@pytest.mark.parametrize("name", ANALYSES)
def test_receipts_hold(name: str, model: Transformer) -> None:
    if name in OF_FEEDFORWARD and model.settings.feedforward == "none":
        with pytest.raises(LumiereError, match="no feed-forward parts"):
            ANALYSES[name](model)
        return
    result = ANALYSES[name](model)
    assert result.receipts
    assert result.holds, [receipt for receipt in result.receipts if not receipt.holds]
    assert list(result.rows())


@pytest.mark.parametrize("unit", ["head", "feedforward", "layer"])
def test_ablating_a_unit_is_leaving_out_what_it_writes(unit: str, model: Transformer) -> None:
    """Against whole forward passes of a model without the columns of the output, or with the part replaced."""
    if unit == "feedforward" and model.settings.feedforward == "none":
        pytest.skip("the model has none")
    changed, stream = deepcopy(model), []
    hooks: dict[str, Hook] = {}
    if unit == "head":
        changed.get_parameter("blocks.1.attention.output.weight").data[:, model.d_value : 2 * model.d_value] = 0
    elif unit == "feedforward":
        hooks = {"blocks.1.hook_mlp_out": torch.zeros_like}
    else:
        hooks = {"blocks.1.hook_resid_post": lambda _: stream[0]}
    change, num_targets = 0.0, 0
    for batch in BATCHES:
        with torch.no_grad():
            output = model(batch.tokens)
            stream[:] = [output.residuals[1]]
            with hooked(changed, hooks):
                both = output.logits, changed.logits(batch.tokens)
        before, after = (F.cross_entropy(x.flatten(0, 1), batch.targets.flatten(), reduction="sum") for x in both)
        change += (after - before).item()
        num_targets += batch.num_targets
    result = ablate(model, BATCHES, unit, "zero")
    found = result.changes[(result.layers == 1) & (result.indices == (1 if unit == "head" else 0))]
    assert found == pytest.approx(change / num_targets, abs=1e-9)


def test_heads_of_one_group_share_their_keys_and_values(model: Transformer) -> None:
    """Results are those of a model in which each head has a copy of its keys and values."""
    groups = model.settings.key_value_heads
    if groups == model.num_heads:
        pytest.skip("the model has no groups")
    ungrouped = build(model.settings.model_dump() | {"num_key_value_heads": None})
    repeats = model.num_heads // groups
    shared = tuple(f"attention.{part}.{kind}" for part in ("key", "value") for kind in ("weight", "bias"))
    weights = model.state_dict()
    for name, value in weights.items():
        if name.endswith(shared):
            weights[name] = value.unflatten(0, (groups, -1)).repeat_interleave(repeats, 0).flatten(0, 1)
    ungrouped.load_state_dict(weights)
    np.testing.assert_allclose(composition_scores(model).scores, composition_scores(ungrouped).scores, atol=1e-12)
    parts, expected = (logit_attribution(each, TOKENS, [9], 71, by="source") for each in (model, ungrouped))
    np.testing.assert_allclose(parts.sources, expected.sources, atol=1e-9)


def test_a_model_without_biases_has_no_columns_for_them() -> None:
    assert not any("bias" in name for name in logit_attribution(random_model(), TOKENS, [9], 71).as_dict())
