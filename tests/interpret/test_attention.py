"""Attention patterns against a softmax in numpy, on a circuit that is known, and statistics by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.errors import LumiereError
from lumiere.interpret.attention import (
    COMBINED,
    WEIGHTED,
    WeightedPatterns,
    attention_patterns,
    combined_attention,
    statistics,
)
from lumiere.models.transformer import Transformer
from tests.interpret.circuits import FIRST, PREVIOUS, repeated_tokens
from tests.interpret.models import TOKENS, random_model


def test_patterns_are_the_softmax_of_queries_and_keys(model: Transformer) -> None:
    patterns = attention_patterns(model, TOKENS).patterns
    length = len(TOKENS)
    with torch.no_grad():
        output, cache = run_with_cache(model, torch.tensor([TOKENS]))
    np.testing.assert_allclose(patterns, output.attention_weights[0].numpy(), atol=1e-5)
    for layer, head in np.ndindex(model.num_layers, model.num_heads):
        if model.settings.positions == "learned":
            q_TK, k_SK = (cache[f"blocks.{layer}.attn.hook_{name}"][0, :, head].double().numpy() for name in "qk")
            weights = np.exp(q_TK @ k_SK.T / np.sqrt(model.d_key)) * np.tri(length)
            np.testing.assert_allclose(patterns[layer, head], weights / weights.sum(axis=1, keepdims=True), atol=1e-5)
        assert not np.triu(patterns[layer, head], 1).any()
    assert not np.allclose(patterns[0, 0], patterns[0, 1], atol=1e-3)  # heads differ


def test_receipts_show_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that neither sum to 1 nor leave the future alone, and a sum that is not what the model added."""
    model = random_model()
    with torch.no_grad():
        output = model(torch.tensor([TOKENS]))
    broken = output.attention_weights.clone()
    broken[0, 1, 0, 2, 3] = 0.25
    broken[0, 2, 1, 3, 0] += 0.5
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda tokens: dataclasses.replace(output, kept_patterns=broken.unbind(1)))
        sums, later = attention_patterns(model, TOKENS).receipts
    assert (sums.error, later.error) == (pytest.approx(0.5, abs=1e-6), 0.25)
    assert not sums.holds
    assert not later.holds
    watched = run_with_cache

    def half(*arguments: object) -> object:
        output, cache = watched(*arguments)  # pyright: ignore[reportArgumentType]
        return output, {name: value * (0.5 if name.endswith("attn_out") else 1) for name, value in cache.items()}

    monkeypatch.setattr("lumiere.interpret.attention.run_with_cache", half)
    assert not attention_patterns(model, TOKENS, kind="norm-weighted").holds


@pytest.mark.parametrize("kind", WEIGHTED[1:])
def test_weighted_patterns_one_by_one(kind: str, model: Transformer) -> None:
    """The size of each vector that is taken, A[t, s] v_s or A[t, s] v_s W_O, computed on its own."""
    result = attention_patterns(model, TOKENS, kind=kind)
    assert isinstance(result, WeightedPatterns)
    with torch.no_grad():
        output, cache = run_with_cache(model, torch.tensor([TOKENS]))
    length = len(TOKENS)
    for layer, head in np.ndindex(model.num_layers, model.num_heads):
        width = model.d_value
        output_EV = model.blocks[layer].attention.output.weight[:, head * width : (head + 1) * width].detach()
        sizes = np.zeros((length, length))
        for t in range(length):
            for s in range(t + 1):
                taken = (
                    output.attention_weights[0, layer, head, t, s] * cache[f"blocks.{layer}.attn.hook_v"][0, s, head]
                )
                sizes[t, s] = float((output_EV @ taken if kind == "norm-weighted" else taken).norm())
        np.testing.assert_allclose(result.norms[layer, head], sizes, rtol=1e-4, atol=1e-6)
        shares = sizes / sizes.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(result.patterns[layer, head], shares, rtol=1e-4, atol=1e-6)
    assert not np.allclose(result.patterns, attention_patterns(model, TOKENS).patterns, atol=1e-3)


def test_combined_one_by_one(model: Transformer) -> None:
    patterns = attention_patterns(model, TOKENS).patterns.astype(np.float64)
    found = {kind: combined_attention(model, TOKENS, kind=kind) for kind in COMBINED}
    np.testing.assert_allclose(found["mean"].weights, sum(patterns[:, h] for h in range(2)) / 2, atol=1e-6)
    np.testing.assert_allclose(found["max"].weights, np.maximum(patterns[:, 0], patterns[:, 1]), atol=1e-6)
    length = len(TOKENS)
    reached = np.eye(length)
    for layer in range(model.num_layers):
        mixed = np.zeros((length, length))
        for t in range(length):  # what t has is half its own, and half what its sources have
            mixed[t] = 0.5 * reached[t] + sum(0.5 * patterns[layer, :, t, s].mean() * reached[s] for s in range(length))
        reached = mixed
        np.testing.assert_allclose(found["rollout"].weights[layer], reached, atol=1e-5)
    assert (found["rollout"].weights[:, 0, 0] == 1).all()


def test_statistics_by_hand() -> None:
    pattern = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0, 0.75]])
    found = statistics(pattern)
    last = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(found["entropy"], [0, np.log(2), last])
    np.testing.assert_allclose(found["distance"], [0, 0.5, 0.5])
    assert found["normalized_entropy"] == pytest.approx((1 + last / np.log(3)) / 2)
    assert (found["mean_distance"], found["first"], found["previous"], found["current"]) == (0.5, 0.375, 0.25, 0.625)


def test_heads_that_move_nothing_take_nothing(circuit: Transformer) -> None:
    result = attention_patterns(circuit, repeated_tokens(5), kind="norm-weighted")
    assert not result.patterns[FIRST].any()
    assert result.patterns[PREVIOUS][4, 3] == pytest.approx(1)


def test_one_token_looks_at_itself_and_has_no_means() -> None:
    model = random_model()
    result = attention_patterns(model, [5])
    assert result.patterns.tolist() == [[[[1.0]]] * 2] * 3
    assert np.isnan(result.normalized_entropy).all()
    assert result.entropy.tolist() == [[[0.0]] * 2] * 3
    for kind in COMBINED:
        assert combined_attention(model, [5], kind=kind).weights.tolist() == [[[1.0]]] * 3


def test_refused_kinds() -> None:
    for analysis, kind in ((attention_patterns, "mean"), (combined_attention, "pattern")):
        with pytest.raises(LumiereError, match=f"'{kind}'"):
            analysis(random_model(), TOKENS, kind=kind)
