"""Direct logit attribution: every part alone against its own forward pass, and the sums."""

from typing import Any

import numpy as np
import pytest
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.components.layers import feedforward_of
from lumiere.interpret import logit_attribution as logits_module
from lumiere.interpret.logit_attribution import LEVELS, logit_attribution
from lumiere.models.transformer import Transformer
from tests.interpret.models import TOKENS, random_model

PAIR = TARGET, VERSUS = 71, 9
PARTS = ("logits", "embed", "attention", "heads", "sources", "feedforward", "neurons")


def explained(model: Transformer, stream_E: torch.Tensor, scale: torch.Tensor) -> float:
    """The centered logit of TARGET that a part of the stream gives under a frozen scale, by the model's own head."""
    logits_V = model.unembed(model.final_norm.affine(stream_E / scale))
    return float(logits_V[TARGET] - logits_V.mean())


def test_every_part_is_what_it_writes_alone(model: Transformer) -> None:
    """Each head, source and neuron, kept alone by masking the activation that its matrix reads."""
    result = logit_attribution(model, TOKENS, [6], TARGET)
    with torch.no_grad():
        _, cache = run_with_cache(model, torch.tensor([TOKENS]))
        scale = cache["ln_final.hook_scale"][0, 6]
        assert result.embed[0] == pytest.approx(explained(model, cache["hook_embed"][0, 6], scale), abs=1e-4)
        if result.pos_embed is not None:
            position = explained(model, cache["hook_pos_embed"][0, 6], scale)
            assert result.pos_embed[0] == pytest.approx(position, abs=1e-4)
        for layer, block in enumerate(model.blocks):
            name = f"blocks.{layer}."
            attention, feedforward = (cache[f"{name}hook_{part}_out"][0, 6] for part in ("attn", "mlp"))
            assert result.attention[0, layer] == pytest.approx(explained(model, attention, scale), abs=1e-4)
            assert result.feedforward[0, layer] == pytest.approx(explained(model, feedforward, scale), abs=1e-4)
            for head in range(model.num_heads):
                alone_HV = torch.zeros(model.num_heads, model.d_value)
                alone_HV[head] = cache[f"{name}attn.hook_z"][0, 6, head]
                written = explained(model, block.attention.output(alone_HV.flatten()), scale)
                assert result.heads[0, layer, head] == pytest.approx(written, abs=1e-4)
                for source in range(len(TOKENS)):
                    weight = cache[f"{name}attn.hook_pattern"][0, head, 6, source]
                    alone_HV[head] = weight * cache[f"{name}attn.hook_v"][0, source, head]
                    written = explained(model, block.attention.output(alone_HV.flatten()), scale)
                    assert result.sources[0, layer, head, source] == pytest.approx(written, abs=1e-4)
            for neuron in range(model.d_ff):
                alone_F = torch.zeros(model.d_ff)
                alone_F[neuron] = cache[f"{name}mlp.hook_post"][0, 6, neuron]
                written = explained(model, feedforward_of(block).down(alone_F), scale)
                assert result.neurons[0, layer, neuron] == pytest.approx(written, abs=1e-4)
    assert np.abs(result.heads).max() > 0.001  # they matter


def test_the_centered_logit_is_the_mean_difference_from_the_averaged_tokens(model: Transformer) -> None:
    averaged = [3, 4, 9, 70, 71, 300]
    result = logit_attribution(model, TOKENS, target=TARGET, averaged=averaged)
    differences = [logit_attribution(model, TOKENS, target=TARGET, versus=token) for token in averaged]
    for name in PARTS:
        expected = np.mean([getattr(difference, name) for difference in differences], axis=0)
        np.testing.assert_allclose(getattr(result, name), expected, atol=1e-10)
    assert (result.num_averaged, result.reference, differences[0].reference) == (len(averaged), "mean", "token")
    assert logit_attribution(model, TOKENS, target=TARGET, centered=False).reference == "none"


def test_log_probability_by_its_gradient(model: Transformer) -> None:
    """The parts are the products of what was written with the gradient of ln p in the normalized stream."""
    result = logit_attribution(model, TOKENS, [6], TARGET, log_probability=True)
    with torch.no_grad():
        _, cache = run_with_cache(model, torch.tensor([TOKENS]))
    gain_E = model.final_norm.get_parameter("weight").detach().double()
    normalized_E = cache["ln_final.hook_normalized"][0, 6].double().requires_grad_()
    log_p_V = (normalized_E * gain_E @ model.token_embedding.weight.detach().double().T).log_softmax(-1)
    (gradient_E,) = torch.autograd.grad(log_p_V[TARGET], normalized_E)
    log_p_V = log_p_V.detach()
    weight_E = gradient_E / cache["ln_final.hook_scale"][0, 6]
    for layer in range(model.num_layers):
        for name, values in (("attn", result.attention), ("mlp", result.feedforward)):
            written_E = cache[f"blocks.{layer}.hook_{name}_out"][0, 6].double()
            assert values[0, layer] == pytest.approx(float(written_E @ weight_E), abs=1e-4)
    entropy = -float((log_p_V.exp() * log_p_V).sum())
    assert result.entropies[0] == pytest.approx(entropy, abs=1e-4)
    assert result.logits[0] == pytest.approx(float(log_p_V[TARGET]) + entropy, abs=1e-4)
    assert result.holds


def test_without_a_target_it_is_the_most_probable(model: Transformer) -> None:
    result = logit_attribution(model, TOKENS, [2, 5])
    with torch.no_grad():
        logits_PV = model(torch.tensor([TOKENS])).logits[0, [2, 5]]
    assert result.targets == tuple(logits_PV.argmax(-1).tolist())
    np.testing.assert_allclose(result.probabilities, logits_PV.softmax(-1).amax(-1), rtol=1e-5)


def test_rows_name_each_part_once() -> None:
    result = {level: logit_attribution(random_model(), TOKENS, [3], TARGET, by=level) for level in LEVELS}
    names = {
        level: [tuple(value for name, value in row.items() if name != "contribution") for row in result[level].rows()]
        for level in LEVELS
    }
    # embed and pos_embed, then by layer: attention or its 2 heads or their 4 sources each, feed-forward or 9 neurons
    assert {level: len(rows) for level, rows in names.items()} == {
        "layer": 2 + 3 * 2,
        "head": 2 + 3 * 3,
        "neuron": 2 + 3 * 10,
        "source": 2 + 3 * (2 * 4 + 1),
    }
    assert all(len(set(rows)) == len(rows) for rows in names.values())


def test_the_gain_belongs_to_the_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual mistake with RMSNorm is caught by every receipt."""
    model = random_model()
    original = logits_module.frozen_directions

    def without_gain(model: Transformer, *rest: Any) -> Any:
        direction_PE, bias_P = original(model, *rest)
        return direction_PE / model.final_norm.get_parameter("weight"), bias_P

    monkeypatch.setattr(logits_module, "frozen_directions", without_gain)
    assert not any(receipt.holds for receipt in logit_attribution(model, TOKENS, target=TARGET).receipts)
