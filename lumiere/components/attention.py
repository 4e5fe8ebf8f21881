"""Causal multi-head self-attention (Vaswani et al. 2017): `softmax(q k^T / sqrt(d_key)) v`, heads joined by `output`.

Shapes: B batch, T position of the query, S position of the key, E embedding_size, H head, K d_key, V d_value.
T and S are the same positions.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lumiere.components.hooks import HookPoint
from lumiere.components.positions import Rotation, rotate
from lumiere.device import prefers_hand_written

# Torch's fused attention never stores the T x S scores. On a CPU it is faster at every length in float32 (forward and
# backward, 1.4 times at 64 positions, 2 times at 511), but in bfloat16 its backward is so slow that batched matrix
# products win below this length: 4 times at 64 positions, 1.6 times at 256. Other devices always want it fused.
BFLOAT16_FUSED_MIN_POSITIONS = 512


class Attention(nn.Module):
    """Each position reads from itself and the positions before it. Nothing has a bias.

    Hook points, named as in TransformerLens: `hook_q`, `hook_k`, `hook_v` (B, T, H, K or V) before any rotation,
    `hook_attn_scores` (B, H, T, S) scaled and with -inf where a key is hidden, `hook_pattern` (B, H, T, S), and
    `hook_z` (B, T, H, V), each head's output before the heads are joined.

    Args:
        embedding_size: width of the residual stream.
        num_heads: number of heads.
        d_key: width of a head's queries and keys.
        d_value: width of a head's values.
    """

    def __init__(self, embedding_size: int, num_heads: int, d_key: int, d_value: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.d_key = d_key
        self.d_value = d_value
        self.query = nn.Linear(embedding_size, num_heads * d_key, bias=False)
        self.key = nn.Linear(embedding_size, num_heads * d_key, bias=False)
        self.value = nn.Linear(embedding_size, num_heads * d_value, bias=False)
        self.output = nn.Linear(num_heads * d_value, embedding_size, bias=False)
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()

    def project(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys (B, T, H, K) and values (B, T, H, V), before any rotation."""
        # One product for the three, which copies the weights and is still faster: the products are small.
        weights = [self.query.weight, self.key.weight, self.value.weight]
        q, k, v = F.linear(x_BTE, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)
        return (
            q.unflatten(-1, (self.num_heads, self.d_key)),
            k.unflatten(-1, (self.num_heads, self.d_key)),
            v.unflatten(-1, (self.num_heads, self.d_value)),
        )

    def forward(self, x_BTE: Tensor, rotation: Rotation | None = None) -> Tensor:
        """The fast path: the joined heads' output, (B, T, E), with no mask but the causal one."""
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTE)
        if rotation is not None:
            q_BTHK, k_BTHK = rotate(q_BTHK, rotation), rotate(k_BTHK, rotation)
        return self.output(causal_attention(q_BTHK, k_BTHK, v_BTHV).flatten(-2))

    def watch(self, x_BTE: Tensor, visible_B1TS: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """The same through the hook points, with the pattern.

        Args:
            x_BTE: what the heads read.
            visible_B1TS: True where a query may look at a key, from `visible_keys`.
            rotation: turns queries and keys, where positions are rotary.

        Returns:
            The output (B, T, E) and the pattern (B, H, T, S), whose rows sum to 1.
        """
        q_BTHK, k_BTHK, v_BTHV = self.project(x_BTE)
        q_BTHK, k_BTHK, v_BTHV = self.hook_q(q_BTHK), self.hook_k(k_BTHK), self.hook_v(v_BTHV)
        if rotation is not None:
            q_BTHK, k_BTHK = rotate(q_BTHK, rotation), rotate(k_BTHK, rotation)
        scores_BHTS = self.hook_attn_scores(masked_scores(q_BTHK, k_BTHK, visible_B1TS))
        pattern_BHTS = self.hook_pattern(scores_BHTS.softmax(dim=-1))
        z_BTHV = self.hook_z(torch.einsum("bhts,bshv->bthv", pattern_BHTS, v_BTHV))
        return self.output(z_BTHV.flatten(-2)), pattern_BHTS


def masked_scores(q_BTHK: Tensor, k_BTHK: Tensor, visible_B1TS: Tensor) -> Tensor:
    """`q k^T / sqrt(d_key)`, -inf where a key is hidden: (B, H, T, S), in one pass over them."""
    num_heads = q_BTHK.shape[2]
    q_NTK, k_NSK = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTHK, k_BTHK))  # N is B * H
    hidden_B1TS = q_BTHK.new_zeros(visible_B1TS.shape).masked_fill_(~visible_B1TS, -math.inf)
    is_shared = len(hidden_B1TS) == 1
    hidden_NTS = hidden_B1TS[0] if is_shared else hidden_B1TS.expand(-1, num_heads, -1, -1).flatten(0, 1)
    scores_NTS = torch.baddbmm(hidden_NTS, q_NTK, k_NSK.mT, alpha=q_BTHK.shape[-1] ** -0.5)
    return scores_NTS.unflatten(0, (-1, num_heads))


def causal_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
    """Each head's weighted values, (B, T, H, V), by the faster way for the device and the length."""
    if is_fused(q_BTHK, v_BTHV):
        heads = (q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHV.transpose(1, 2))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    num_positions, d_key = q_BTHK.shape[1], q_BTHK.shape[-1]
    hidden_TS = q_BTHK.new_full((num_positions, num_positions), -math.inf).triu(diagonal=1)
    if prefers_hand_written(q_BTHK):
        return _CausalAttention.apply(q_BTHK, k_BTHK, v_BTHV, hidden_TS)
    q_BHTK, k_BHKS, v_BHSV = q_BTHK.transpose(1, 2), k_BTHK.permute(0, 2, 3, 1), v_BTHV.transpose(1, 2)
    return (((q_BHTK * d_key**-0.5) @ k_BHKS + hidden_TS).softmax(dim=-1) @ v_BHSV).transpose(1, 2)


def is_fused(q_BTHK: Tensor, v_BTHV: Tensor) -> bool:
    """Whether torch's fused attention is the faster way for the device, the type and the length."""
    if q_BTHK.device.type != "cpu":
        return True
    # On a CPU, torch has no fused attention for values of another width than the keys.
    min_positions = BFLOAT16_FUSED_MIN_POSITIONS if q_BTHK.dtype == torch.bfloat16 else 0
    return q_BTHK.shape[-1] == v_BTHV.shape[-1] and q_BTHK.shape[1] >= min_positions


class _CausalAttention(Function):
    """Attention by products of small matrices, one for each head of each sequence.

    The forward and the backward compute in the type of the queries: `torch.autocast` would take the softmax, and with
    it all that is kept for the backward, to float32. The softmax of bfloat16 still adds up in float32.
    """

    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, hidden_TS: Tensor) -> Tensor:
        # N is B * H, as the batched product wants it.
        q_NTK, k_NSK, v_NSV = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTHK, k_BTHK, v_BTHV))
        with torch.autocast(q_BTHK.device.type, enabled=False):
            scores_NTS = torch.baddbmm(hidden_TS, q_NTK, k_NSK.mT, alpha=q_BTHK.shape[-1] ** -0.5)
            pattern_NTS = scores_NTS.softmax(dim=-1)
            z_NTV = pattern_NTS @ v_NSV
        ctx.save_for_backward(q_NTK, k_NSK, v_NSV, pattern_NTS)
        ctx.num_heads = q_BTHK.shape[2]
        return z_NTV.unflatten(0, (-1, ctx.num_heads)).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTHV: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_NTK, k_NSK, v_NSV, pattern_NTS = ctx.saved_tensors
        gradient_NTV = gradient_BTHV.transpose(1, 2).flatten(0, 1)
        # The softmax's gradient, P * (dP - sum(P * dP)), as one pass; scaled as the scores were.
        scores_NTS = torch.ops.aten._softmax_backward_data(gradient_NTV @ v_NSV.mT, pattern_NTS, -1, pattern_NTS.dtype)
        scores_NTS.mul_(q_NTK.shape[-1] ** -0.5)
        to_heads = (scores_NTS @ k_NSK, scores_NTS.mT @ q_NTK, pattern_NTS.mT @ gradient_NTV)
        q_BTHK, k_BTHK, v_BTHV = (x.unflatten(0, (-1, ctx.num_heads)).transpose(1, 2) for x in to_heads)
        return q_BTHK, k_BTHK, v_BTHV, None


def visible_keys(num_positions: int, device: torch.device, real_BT: Tensor | None = None) -> Tensor:
    """Where a query may look at a key: (B, 1, T, S), or (1, 1, T, S) without padding; True is visible.

    A query sees the real tokens at its own position and before. It always sees itself, so that the row of a padding
    token is not empty: a softmax over nothing is NaN, and NaN times zero would spread from there.

    Args:
        num_positions: T.
        device: of the mask.
        real_BT: True where there is a real token, False where there is padding.
    """
    causal_TS = torch.ones(num_positions, num_positions, dtype=torch.bool, device=device).tril()
    if real_BT is None:
        return causal_TS[None, None]
    itself_TS = torch.eye(num_positions, dtype=torch.bool, device=device)
    return causal_TS & (real_BT[:, None, None, :] | itself_TS)
