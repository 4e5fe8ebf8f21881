"""The layers against numbers computed by hand."""

import math
from typing import Any

import pytest
import torch

from lumiere.components.hooks import hooked
from lumiere.components.kernels import attention_mask, attention_pattern
from lumiere.components.layers import (
    Attention,
    Block,
    Dropout,
    FeedForward,
    ForwardRecord,
    Norm,
    rotate,
    rotation_at,
)
from lumiere.config.schema import ModelConfig


def settings(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"positions": "rotary"} | changes)


def set_weight(layer: torch.nn.Module, values: list) -> None:
    layer.get_parameter("weight").data.copy_(torch.tensor(values))


def test_rotation_by_hand() -> None:
    rotation = rotation_at(torch.tensor([3]), settings(d_key=4), torch.float64)
    # Pair 0 is (x0, x2) and turns by 3; pair 1 is (x1, x3) and turns by 3 / 100.
    x_BTHK = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    expected_K = torch.tensor([math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)], dtype=torch.float64)
    torch.testing.assert_close(rotate(x_BTHK, rotation).flatten(), expected_K)


def test_rotation_tables_are_precise_for_low_precision_queries() -> None:
    rotation = rotation_at(torch.tensor([1000]), settings(d_key=2), torch.float32)
    turned_BTHK = rotate(torch.tensor([1.0, 0.0], dtype=torch.bfloat16).view(1, 1, 1, 2), rotation)
    expected_K = torch.tensor([math.cos(1000), math.sin(1000)]).to(torch.bfloat16)
    assert turned_BTHK.dtype == torch.bfloat16
    assert torch.equal(turned_BTHK.flatten(), expected_K)


def test_rms_norm_by_hand() -> None:
    norm = Norm(4)
    set_weight(norm, [1.0, 2.0, -1.0, 0.0])
    x_BTE = torch.tensor([[[1.0, 7.0, 5.0, 5.0]]])  # the mean of 1, 49, 25, 25 is 25, so s(x) = 5
    for is_enabled in (True, False):
        with torch.set_grad_enabled(is_enabled):
            torch.testing.assert_close(norm(x_BTE), torch.tensor([[[0.2, 2.8, -1.0, 0.0]]]))
    plain = Norm(2)
    assert torch.equal(plain(torch.zeros(1, 1, 2)), torch.zeros(1, 1, 2))
    tiny_BTE = torch.full((1, 1, 2), 1e-3)  # mean square 1e-6, as much as epsilon
    torch.testing.assert_close(plain(tiny_BTE), torch.full((1, 1, 2), 0.5**0.5))


@pytest.mark.parametrize("name", ["hook_scale", "hook_normalized"])
def test_a_norm_hook_that_only_looks_changes_nothing(name: str) -> None:
    norm = Norm(16, has_hooks=True).double()
    norm.get_parameter("weight").data.normal_()
    x_BTE = torch.randn(3, 5, 16, dtype=torch.float64)
    expected_BTE = norm(x_BTE)
    with hooked(norm, {name: lambda activation: None}):
        torch.testing.assert_close(norm(x_BTE), expected_BTE, rtol=0, atol=1e-14)


def test_attention_over_two_tokens_by_hand() -> None:
    attention = Attention(settings(embedding_size=2, num_heads=1, d_key=1, d_value=2, positions="learned"))
    set_weight(attention.query, [[1.0, 0.0]])
    set_weight(attention.key, [[0.0, 1.0]])
    set_weight(attention.value, [[1.0, 0.0], [0.0, 1.0]])
    set_weight(attention.output, [[0.0, 1.0], [2.0, 0.0]])
    # Scores of the second token: 1 * 0 and 1 * ln 3, so it weighs the tokens 1/4 and 3/4.
    x_BTE = torch.tensor([[[4.0, 0.0], [1.0, 1.0986123]]])
    z_V = [0.25 * 4 + 0.75 * 1, 0.75 * 1.0986123]
    record = ForwardRecord()
    torch.testing.assert_close(attention(x_BTE, record=record), torch.tensor([[[0.0, 8.0], [z_V[1], 2 * z_V[0]]]]))
    (kept,) = record.patterns
    assert isinstance(kept, tuple)
    torch.testing.assert_close(attention_pattern(*kept), torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]]))


@pytest.mark.parametrize("num_positions", [9, 64])
@pytest.mark.parametrize("rotary", [False, True])
def test_explicit_scores_and_a_mask_give_the_same_attention(num_positions: int, rotary: bool) -> None:
    chosen = settings(embedding_size=8, num_heads=2, d_key=4, d_value=6)
    attention = Attention(chosen).double()
    rotation = rotation_at(torch.arange(num_positions), chosen, torch.float64) if rotary else None
    x_BTE = torch.randn(2, num_positions, 8, dtype=torch.float64)
    expected_BTE = attention(x_BTE, rotation)
    mask_B1TS = attention_mask(torch.arange(num_positions)[None], num_positions, torch.float64)
    torch.testing.assert_close(attention(x_BTE, rotation, mask_B1TS), expected_BTE, rtol=0, atol=1e-12)
    for name in ("hook_attn_scores", "hook_pattern"):
        with hooked(attention, {name: lambda activation: None}):
            torch.testing.assert_close(attention(x_BTE, rotation), expected_BTE, rtol=0, atol=1e-12)


def test_swiglu_by_hand() -> None:
    swiglu = FeedForward(settings(embedding_size=2, d_ff=2))
    assert swiglu.gate is not None
    set_weight(swiglu.gate, [[1.0, 0.0], [0.0, 1.0]])
    set_weight(swiglu.up, [[0.0, 3.0], [1.0, 0.0]])
    set_weight(swiglu.down, [[1.0, 1.0], [0.0, -2.0]])
    x_BTE = torch.tensor([[[math.log(3), math.log(2)]]])
    # sigmoid(ln 3) = 3/4 and sigmoid(ln 2) = 2/3.
    first, second = 3 / 4 * math.log(3) * 3 * math.log(2), 2 / 3 * math.log(2) * math.log(3)
    for is_enabled in (True, False):
        with torch.set_grad_enabled(is_enabled):
            torch.testing.assert_close(swiglu(x_BTE), torch.tensor([[[first + second, -2 * second]]]))


def test_full_dropout_leaves_the_stream_alone_while_training() -> None:
    block = Block(settings(embedding_size=8, num_heads=2, d_key=4, d_value=4, d_ff=16)).train()
    block.dropout.rate = 1.0
    resid_BTE = torch.randn(2, 5, 8)
    assert torch.equal(block(resid_BTE), resid_BTE)
    assert not torch.equal(block.eval()(resid_BTE), resid_BTE)


def test_dropout_at_its_limits() -> None:
    x = torch.randn(8, 8)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros(8, 8))
    assert torch.isfinite(Dropout(1 - 1e-9)(x)).all()


@pytest.mark.parametrize("shape", [(1,), (3, 3), (2, 5, 7), (0, 4)])
def test_a_seed_repeats_dropout_and_the_gradient_passes_where_the_number_did(shape: tuple[int, ...]) -> None:
    dropout, x = Dropout(0.5), torch.ones(shape, requires_grad=True)
    torch.manual_seed(2)
    first = dropout(x)
    torch.manual_seed(2)
    assert first.shape == shape
    assert torch.equal(dropout(x), first)
    (gradient,) = torch.autograd.grad(first.sum(), [x])
    assert torch.equal(gradient, first)
