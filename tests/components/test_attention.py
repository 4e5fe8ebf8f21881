"""Attention: the mask by hand, and the fast path against torch's own attention and the watching path."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from lumiere.components.kernels import BFLOAT16_FUSED_MIN_POSITIONS, causal_attention, visible_keys
from lumiere.components.layers import Attention, rotation_at

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


@pytest.mark.parametrize("num_positions", [1, 7, 64])
@pytest.mark.parametrize("d_value", [4, 6])
def test_both_fast_ways_equal_torchs_attention(num_positions: int, d_value: int) -> None:
    q_BTHK, k_BTHK = torch.randn(2, 2, num_positions, 3, 4, dtype=torch.float64).unbind()
    v_BTHV = torch.randn(2, num_positions, 3, d_value, dtype=torch.float64)
    mask_TS = torch.ones(num_positions, num_positions, dtype=torch.bool).tril()
    heads = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
    expected_BTHV = F.scaled_dot_product_attention(*heads, attn_mask=mask_TS).transpose(1, 2)
    torch.testing.assert_close(causal_attention(q_BTHK, k_BTHK, v_BTHV), expected_BTHV, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "num_positions", "d_value", "is_kept"),
    [
        (torch.float32, 64, 4, False),
        (torch.float32, 64, 5, True),  # torch's fused attention wants values as wide as keys
        (torch.bfloat16, 64, 4, True),
        (torch.bfloat16, BFLOAT16_FUSED_MIN_POSITIONS, 4, False),
    ],
)
def test_the_pattern_is_kept_only_where_that_is_faster(
    dtype: torch.dtype, num_positions: int, d_value: int, is_kept: bool
) -> None:
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    inputs = [torch.randn(1, num_positions, 1, width, dtype=dtype, requires_grad=True) for width in (4, 4, d_value)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        causal_attention(*inputs)
    assert (max(sizes) >= num_positions**2) == is_kept


@pytest.mark.parametrize("d_value", [3, 5])
def test_gradients_by_finite_differences(d_value: int) -> None:
    """Fused where the values are as wide as the keys, hand-written elsewhere."""
    inputs = [torch.randn(2, 6, 2, width, dtype=torch.float64, requires_grad=True) for width in (3, 3, d_value)]
    assert gradcheck(causal_attention, inputs)


def test_hand_written_gradients_are_those_of_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(2, 6, 2, width, dtype=torch.float64, requires_grad=True) for width in (3, 3, 5)]
    weights_BTHV = torch.randn(2, 6, 2, 5, dtype=torch.float64)
    mine = torch.autograd.grad((causal_attention(*inputs) * weights_BTHV).sum(), inputs)
    monkeypatch.setattr("lumiere.components.kernels.prefers_hand_written", lambda x: False)
    plain = torch.autograd.grad((causal_attention(*inputs) * weights_BTHV).sum(), inputs)
    for gradient, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_positions", [16, BFLOAT16_FUSED_MIN_POSITIONS])
def test_in_bfloat16_it_stays_near_float32(num_positions: int) -> None:
    q_BTHK, k_BTHK, v_BTHV = (torch.randn(2, num_positions, 2, 8) for _ in range(3))
    expected_BTHV = causal_attention(q_BTHK, k_BTHK, v_BTHV)
    with torch.autocast("cpu", torch.bfloat16):
        z_BTHV = causal_attention(q_BTHK.bfloat16(), k_BTHK.bfloat16(), v_BTHV.bfloat16())
    assert z_BTHV.dtype == torch.bfloat16
    # bfloat16 has 8 bits: a relative error of 2^-9 for each rounding.
    torch.testing.assert_close(z_BTHV.float(), expected_BTHV, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("num_positions", [9, 64])
@pytest.mark.parametrize("rotary", [False, True])
def test_watching_gives_the_same(num_positions: int, rotary: bool) -> None:
    attention = Attention(embedding_size=8, num_heads=2, d_key=4, d_value=6).double()
    rotation = rotation_at(torch.arange(num_positions), 4, torch.float64) if rotary else None
    x_BTE = torch.randn(2, num_positions, 8, dtype=torch.float64)
    output_BTE, _ = attention.watch(x_BTE, visible_keys(num_positions, CPU), rotation)
    torch.testing.assert_close(attention(x_BTE, rotation), output_BTE, rtol=0, atol=1e-12)
