"""Attention patterns against a softmax in numpy, and the receipts that come with them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere.components.hooks import run_with_cache
from lumiere.config.loader import validate
from lumiere.interpret.attention import AttentionPatterns, attention_patterns
from lumiere.models.transformer import Transformer, build_model

TOKENS = [0, 70, 71, 72, 70, 71, 9, 300, 4, 1]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Three layers of two heads, with weights large enough that heads look somewhere."""
    sizes = {"embedding_size": 12, "context_size": 16, "num_layers": 3, "num_heads": 2, "d_key": 5, "d_value": 7}
    torch.manual_seed(1)
    model = build_model(validate({"model": {**sizes, "d_ff": 9, "dropout": 0.5}})).eval()
    for parameter in model.parameters():
        parameter.data *= 20 if parameter.ndim == 2 else 1
    return model


def test_patterns_are_the_softmax_of_queries_and_keys(model: Transformer) -> None:
    patterns = attention_patterns(model, TOKENS).patterns
    length = len(TOKENS)
    assert patterns.shape == (3, 2, length, length)
    assert patterns.dtype == np.float32
    with torch.no_grad():
        _, cache = run_with_cache(model, torch.tensor([TOKENS]))
    for layer in range(3):
        for head in range(2):
            q_TK, k_SK = (cache[f"blocks.{layer}.attn.hook_{name}"][0, :, head].double().numpy() for name in "qk")
            weights = np.exp(q_TK @ k_SK.T / np.sqrt(5)) * np.tri(length)
            expected = weights / weights.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(patterns[layer, head], expected, atol=1e-5)
    # Heads of this model differ and look somewhere: the comparison above is not one of uniform rows.
    assert patterns[:, :, -1].max() > 0.5
    assert not np.allclose(patterns[0, 0], patterns[0, 1], atol=0.05)


def test_patterns_are_those_of_the_model(model: Transformer) -> None:
    result = attention_patterns(model, TOKENS)
    assert result.tokens == tuple(TOKENS)
    with torch.no_grad():
        weights = model(torch.tensor([TOKENS])).attention_weights
    assert np.array_equal(result.patterns, weights[0].numpy())
    assert all(point is None for point in (module.hook for module in model.modules() if hasattr(module, "hook")))


def errors(result: AttentionPatterns) -> dict[str, float]:
    return {receipt.law: receipt.error for receipt in result.receipts}


@given(st.lists(st.integers(3, 300), min_size=1, max_size=16))
def test_receipts(model: Transformer, tokens: list[int]) -> None:
    result = attention_patterns(model, tokens)
    assert result.holds
    row_sum_error = np.abs(result.patterns.astype(np.float64).sum(-1) - 1).max()
    assert errors(result) == {"rows sum to 1": row_sum_error, "no weight on a later token": 0.0}
    assert not np.triu(result.patterns, 1).any()
    assert (result.patterns >= 0).all()
    assert (result.patterns[:, :, 0, 0] == 1).all()


def test_receipts_show_what_is_wrong(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose weights neither sum to 1 nor leave the future alone."""
    with torch.no_grad():
        output = model(torch.tensor([TOKENS]))
    broken = output.attention_weights.clone()
    broken[0, 1, 0, 2, 3] = 0.25
    broken[0, 2, 1, 3, 0] += 0.5
    monkeypatch.setattr(model, "forward", lambda tokens: dataclasses.replace(output, attention_weights=broken))
    result = attention_patterns(model, TOKENS)
    assert not any(receipt.holds for receipt in result.receipts)
    assert errors(result)["no weight on a later token"] == 0.25
    assert errors(result)["rows sum to 1"] == pytest.approx(0.5, abs=1e-6)


def test_layers_and_heads_are_chosen(model: Transformer) -> None:
    everything, part = attention_patterns(model, TOKENS), attention_patterns(model, TOKENS, [2, 0], [1])
    assert (part.layers, part.heads) == ((2, 0), (1,))
    assert np.array_equal(part.patterns, everything.patterns[[2, 0]][:, [1]])


def test_one_token_looks_at_itself(model: Transformer) -> None:
    result = attention_patterns(model, [5])
    assert result.patterns.tolist() == [[[[1.0]]] * 2] * 3
    assert result.holds


def test_too_many_tokens_are_a_wrong_call(model: Transformer) -> None:
    with pytest.raises(ValueError, match="1 to 16 tokens, not 17"):
        attention_patterns(model, [5] * 17)
