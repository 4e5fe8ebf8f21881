"""Attention patterns against a softmax in numpy, and the receipts that come with them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere.components.hooks import run_with_cache
from lumiere.interpret.attention import (
    COMBINED,
    WEIGHTED,
    AttentionPatterns,
    CombinedAttention,
    WeightedPatterns,
    attention_patterns,
    combined_attention,
    rollout,
    statistics,
)
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run
from tests.interpret.circuits import CURRENT, FIRST, PREVIOUS, UNIFORM, induction_circuit, repeated_tokens
from tests.interpret.looking import looking_model

TOKENS = [0, 70, 71, 72, 70, 71, 9, 300, 4, 1]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return looking_model()


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


def errors(result: AttentionPatterns | CombinedAttention) -> dict[str, float]:
    return {receipt.check: receipt.error for receipt in result.receipts}


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
    monkeypatch.setattr(model, "forward", lambda tokens: dataclasses.replace(output, kept_patterns=broken.unbind(1)))
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


@pytest.fixture
def trained(trained_run: Run) -> Transformer:
    return trained_run.load_model("best")


@pytest.mark.parametrize("name", ["model", "trained"])
@pytest.mark.parametrize("kind", WEIGHTED[1:])
def test_weighted_patterns_one_by_one(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    """The size of each vector that is taken, A[t, s] v_s or A[t, s] v_s W_O, computed on its own."""
    model: Transformer = request.getfixturevalue(name)
    result = attention_patterns(model, TOKENS, kind=kind)
    assert isinstance(result, WeightedPatterns)
    assert result.holds
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


def test_heads_that_move_nothing_take_nothing() -> None:
    circuit = induction_circuit()
    result = attention_patterns(circuit, repeated_tokens(5), kind="norm-weighted")
    assert result.holds
    assert not result.patterns[FIRST].any()
    assert result.patterns[PREVIOUS][4, 3] == pytest.approx(1)


def test_a_sum_that_is_not_the_output_is_found(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receipt compares with what the model added to its stream, not with the same sum again."""
    watched = run_with_cache

    def half(*arguments: object) -> object:
        output, cache = watched(*arguments)  # pyright: ignore[reportArgumentType]
        return output, {name: value * (0.5 if name.endswith("attn_out") else 1) for name, value in cache.items()}

    monkeypatch.setattr("lumiere.interpret.attention.run_with_cache", half)
    assert not attention_patterns(model, TOKENS, kind="norm-weighted").holds


@pytest.mark.parametrize("name", ["model", "trained"])
def test_combined_one_by_one(name: str, request: pytest.FixtureRequest) -> None:
    model: Transformer = request.getfixturevalue(name)
    patterns = attention_patterns(model, TOKENS).patterns.astype(np.float64)
    found = {kind: combined_attention(model, TOKENS, kind=kind) for kind in COMBINED}
    assert all(result.holds for result in found.values())
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


def test_rollout_of_heads_that_look_at_themselves() -> None:
    assert np.array_equal(rollout(np.stack([np.eye(4)] * 3)), np.stack([np.eye(4)] * 3))


def test_rollout_of_previous_token_heads() -> None:
    """Half stays, half comes from one token back: binomial shares."""
    previous = np.diag(np.ones(4), -1)
    previous[0, 0] = 1
    assert rollout(np.stack([previous] * 2))[-1][4].tolist() == [0, 0, 0.25, 0.5, 0.25]


def test_layers_and_heads_of_combined_attention(model: Transformer) -> None:
    everything = combined_attention(model, TOKENS, kind="rollout")
    part = combined_attention(model, TOKENS, [2], kind="rollout")
    assert np.array_equal(part.weights, everything.weights[[2]])
    single = combined_attention(model, TOKENS, [1], [0], kind="mean")
    assert np.array_equal(single.weights[0], attention_patterns(model, TOKENS, [1], [0]).patterns[0, 0])


def test_statistics_of_heads_that_are_known() -> None:
    length = 31
    result = attention_patterns(induction_circuit(), repeated_tokens(15))
    distances = {PREVIOUS: 1, CURRENT: 0, FIRST: sum(range(1, length)) / (length - 1)}
    for place, distance in distances.items():
        assert result.normalized_entropy[place] == pytest.approx(0, abs=1e-6)
        assert result.mean_distance[place] == pytest.approx(distance, abs=1e-5)
    assert (result.previous[PREVIOUS], result.current[CURRENT], result.first[FIRST]) == pytest.approx((1, 1, 1))
    np.testing.assert_allclose(result.distance[UNIFORM], np.arange(length) / 2, rtol=1e-5)
    np.testing.assert_allclose(result.entropy[UNIFORM], np.log(np.arange(1, length + 1)), rtol=1e-5)
    assert result.normalized_entropy[UNIFORM] == pytest.approx(1)


def test_statistics_by_hand() -> None:
    pattern = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0, 0.75]])
    found = statistics(pattern)
    last = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(found["entropy"], [0, np.log(2), last])
    np.testing.assert_allclose(found["distance"], [0, 0.5, 0.5])
    assert found["normalized_entropy"] == pytest.approx((1 + last / np.log(3)) / 2)
    assert (found["mean_distance"], found["first"], found["previous"], found["current"]) == (0.5, 0.375, 0.25, 0.625)


@given(st.lists(st.integers(3, 300), min_size=2, max_size=16), st.data())
def test_the_future_changes_no_row(model: Transformer, tokens: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(1, len(tokens) - 1))
    changed = [*tokens[:place], 3, *tokens[place + 1 :]]
    for kind in WEIGHTED:
        before, after = (attention_patterns(model, text, kind=kind).patterns for text in (tokens, changed))
        np.testing.assert_allclose(before[:, :, :place], after[:, :, :place], atol=1e-6)


def test_one_token_has_no_means(model: Transformer) -> None:
    result = attention_patterns(model, [5])
    assert np.isnan(result.normalized_entropy).all()
    assert result.entropy.tolist() == [[[0.0]] * 2] * 3
    for kind in COMBINED:
        assert combined_attention(model, [5], kind=kind).weights.tolist() == [[[1.0]]] * 3


def test_kinds_that_there_are_not(model: Transformer) -> None:
    with pytest.raises(ValueError, match="not 'mean'"):
        attention_patterns(model, TOKENS, kind="mean")
    with pytest.raises(ValueError, match="not 'pattern'"):
        combined_attention(model, TOKENS, kind="pattern")
