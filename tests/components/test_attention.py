"""Attention: the mask by hand, and the fast path against torch's own attention and the watching path."""

import pytest
import torch
import torch.nn.functional as F

from lumiere.components.attention import FUSED_MIN_POSITIONS, Attention, causal_attention, visible_keys
from lumiere.components.positions import rotation_at

CPU = torch.device("cpu")


def test_visible_keys_by_hand() -> None:
    assert visible_keys(3, CPU).int().tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    real_BT = torch.tensor([[False, True, True], [True, True, False]])
    assert visible_keys(3, CPU, real_BT).int().tolist() == [
        [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]],  # a padding token sees itself only, and no other token sees it
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
    ]


def test_two_tokens_by_hand() -> None:
    attention = Attention(embedding_size=2, num_heads=1, d_key=1, d_value=2)
    with torch.no_grad():
        attention.query.weight.copy_(torch.tensor([[1.0, 0.0]]))
        attention.key.weight.copy_(torch.tensor([[0.0, 1.0]]))
        attention.value.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        attention.output.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    # Scores of the second token: 1 * 0 and 1 * ln 3, so it weighs the tokens 1/4 and 3/4.
    x_BTE = torch.tensor([[[4.0, 0.0], [1.0, 1.0986123]]])
    z_V = [0.25 * 4 + 0.75 * 1, 0.75 * 1.0986123]
    output_BTE, pattern_BHTS = attention.watch(x_BTE, visible_keys(2, CPU))
    torch.testing.assert_close(pattern_BHTS, torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]]))
    expected_BTE = torch.tensor([[[0.0, 8.0], [z_V[1], 2 * z_V[0]]]])
    torch.testing.assert_close(output_BTE, expected_BTE)
    torch.testing.assert_close(attention(x_BTE), expected_BTE)


@pytest.mark.parametrize("num_positions", [1, 7, FUSED_MIN_POSITIONS - 1, FUSED_MIN_POSITIONS])
@pytest.mark.parametrize("d_value", [4, 6])
def test_both_fast_ways_equal_torchs_attention(num_positions: int, d_value: int) -> None:
    shape = (2, 3, num_positions)
    q_BHTK, k_BHTK = torch.randn(2, *shape, 4, dtype=torch.float64).unbind()
    v_BHTV = torch.randn(*shape, d_value, dtype=torch.float64)
    mask_TS = torch.ones(num_positions, num_positions, dtype=torch.bool).tril()
    expected_BHTV = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTV, attn_mask=mask_TS)
    torch.testing.assert_close(causal_attention(q_BHTK, k_BHTK, v_BHTV), expected_BHTV, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_positions", [9, FUSED_MIN_POSITIONS])
@pytest.mark.parametrize("rotary", [False, True])
def test_watching_gives_the_same(num_positions: int, rotary: bool) -> None:
    attention = Attention(embedding_size=8, num_heads=2, d_key=4, d_value=6).double()
    rotation = rotation_at(torch.arange(num_positions), 4, torch.float64) if rotary else None
    x_BTE = torch.randn(2, num_positions, 8, dtype=torch.float64)
    output_BTE, _ = attention.watch(x_BTE, visible_keys(num_positions, CPU), rotation)
    torch.testing.assert_close(attention(x_BTE, rotation), output_BTE, rtol=0, atol=1e-12)
