"""The arithmetic of the layers: norms, attention, gated units, dropout and the loss, as functions.

Where torch's own operations are slow on a CPU, a function here has a forward and a backward of its own. Accelerators
have fused kernels, and `torch.compile` fuses better what it sees written plainly, so both take torch's operations
(`prefers_hand_written`).

Shapes: B batch, T position of the query, S position of the key, E embedding_size, H head, G head of
keys and values, K d_key, V d_value, F d_ff, Vocab vocab_size, N rows (heads of sequences in attention, tokens in the
loss), M rows of one chunk.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lumiere.device import prefers_hand_written


def rms_norm(x_BTE: Tensor, gain_E: Tensor, epsilon: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + epsilon) * gain` over the last axis; same shape as `x_BTE`."""
    if prefers_hand_written(x_BTE):
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x_BTE, gain_E, epsilon)
        return normalized(x_BTE, epsilon)[0] * gain_E
    return F.rms_norm(x_BTE, gain_E.shape, gain_E, epsilon)


def normalized(x_BTE: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return `x / s(x)` and `1 / s(x)`, (B, T, 1), with `s(x) = sqrt(mean(x^2) + epsilon)`."""
    size, added = _scalars(x_BTE.shape[-1], epsilon, torch.promote_types(x_BTE.dtype, torch.float32))
    mean_square_BT1 = torch.linalg.vector_norm(x_BTE, dim=-1, keepdim=True).square_().div_(size)
    inverse_scale_BT1 = mean_square_BT1.add_(added).rsqrt_()
    return x_BTE * inverse_scale_BT1, inverse_scale_BT1


@cache
def _scalars(size: int, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return both numbers as tensors: torch would convert Python numbers again in every call."""
    return torch.tensor(size, dtype=dtype), torch.tensor(epsilon, dtype=dtype)


class _RMSNorm(Function):
    """`F.rms_norm`, forward and backward in half its time on a CPU: fewer and cheaper passes over the stream.

    With n = x / s(x) and g the gradient of n * gain, the gradient of x is `(g gain - n mean(g gain n)) / s(x)`.
    """

    @staticmethod
    def forward(ctx: Any, x_BTE: Tensor, gain_E: Tensor, epsilon: float) -> Tensor:
        normalized_BTE, inverse_scale_BT1 = normalized(x_BTE, epsilon)
        ctx.save_for_backward(normalized_BTE, inverse_scale_BT1, gain_E)
        return normalized_BTE * gain_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTE: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        normalized_BTE, inverse_scale_BT1, gain_E = ctx.saved_tensors
        product_BTE = gradient_BTE * normalized_BTE
        gain_gradient_E = product_BTE.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean_BT1 = (product_BTE @ gain_E).unsqueeze(-1).div_(gain_E.shape[0])
        # In place, and never `addcmul`, which takes as long as four of these passes.
        correction_BTE = torch.mul(normalized_BTE, mean_BT1, out=product_BTE)
        return (gradient_BTE * gain_E).sub_(correction_BTE).mul_(inverse_scale_BT1), gain_gradient_E, None


# Torch's fused attention never stores the T x S scores. On a CPU it is faster at every length in float32 (forward and
# backward, 1.4 times at 64 positions, 2 times at 511), but in bfloat16 batched matrix products win below this length:
# 4 times at 64 positions, 1.6 times at 256. Other devices always take it.
BFLOAT16_FUSED_MIN_POSITIONS = 512


def attention_mask(
    positions_BT: Tensor,
    num_keys: int,
    dtype: torch.dtype,
    real_BS: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Return what is added to attention scores, (B, 1, T, S): 0 where a query may see a key, -inf elsewhere.

    A query sees the real tokens at its own position and before, the last `window` of them. It always sees itself, so
    that no row is empty: a softmax over nothing is NaN, which would spread.

    Args:
        positions_BT: Position of each query; B may be 1.
        real_BS: True where the key is a real token, False where it is padding.
        window: Positions that a query sees, its own included. None: all.
    """
    columns_S = torch.arange(num_keys, device=positions_BT.device)
    hidden_BTS = columns_S > positions_BT[..., None]
    if window is not None:
        hidden_BTS = hidden_BTS | (columns_S <= positions_BT[..., None] - window)
    if real_BS is not None:
        hidden_BTS = hidden_BTS | (~real_BS[:, None] & (columns_S != positions_BT[..., None]))
    mask_BTS = torch.zeros(hidden_BTS.shape, dtype=dtype, device=columns_S.device)
    return mask_BTS.masked_fill_(hidden_BTS, -math.inf)[:, None]


def per_head(x: Tensor, num_heads: int, dim: int = 1) -> Tensor:
    """Return what each query head sees of keys or values whose heads, H or fewer, are along `dim`."""
    return x if x.shape[dim] == num_heads else x.repeat_interleave(num_heads // x.shape[dim], dim)


def masked_scores(q_BHTK: Tensor, k_BGSK: Tensor, scale: float, mask_B1TS: Tensor | None = None) -> Tensor:
    """Return `scale q k^T + mask`, (B, H, T, S), in one pass over them. Without a mask: causal.

    The keys may have fewer heads, each of which serves an equal number of query heads.
    """
    num_heads, num_queries = q_BHTK.shape[1:3]
    num_keys = k_BGSK.shape[2]
    q_NTK, k_NSK = q_BHTK.flatten(0, 1), per_head(k_BGSK, num_heads).flatten(0, 1)  # N is B * H
    if mask_B1TS is None and num_queries == 1:
        mask_NTS = q_BHTK.new_zeros(1, 1, 1)
    else:
        if mask_B1TS is None:
            mask_B1TS = attention_mask(torch.arange(num_keys, device=q_BHTK.device)[None], num_keys, q_BHTK.dtype)
        mask_NTS = mask_B1TS[0] if len(mask_B1TS) == 1 else mask_B1TS.expand(-1, num_heads, -1, -1).flatten(0, 1)
    scores_NTS = torch.baddbmm(mask_NTS.to(q_NTK.dtype), q_NTK, k_NSK.mT, alpha=scale)
    return scores_NTS.view(-1, num_heads, num_queries, num_keys)


def attention_pattern(q_BHTK: Tensor, k_BGSK: Tensor, scale: float, mask_B1TS: Tensor | None = None) -> Tensor:
    """Return the attention weights, (B, H, T, S), in float32 or wider: each row sums to 1."""
    dtype = torch.promote_types(q_BHTK.dtype, torch.float32)
    return masked_scores(q_BHTK, k_BGSK, scale, mask_B1TS).softmax(dim=-1, dtype=dtype)


def attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, scale: float, mask_B1TS: Tensor | None = None) -> Tensor:
    """Return the weighted values of each head, (B, H, T, V), by the fastest way for the device, type and length.

    Args:
        k_BGSK, v_BGSV: Of as many heads as the queries, or fewer, each of which serves an equal number of them.
        scale: Factor of the scores.
        mask_B1TS: From `attention_mask`. None: causal for queries and keys of the same positions; one query sees all.
    """
    num_heads, num_queries, is_cpu = *q_BHTK.shape[1:3], q_BHTK.device.type == "cpu"
    if k_BGSK.shape[1] < num_heads and mask_B1TS is None and num_queries > 1 and is_cpu and is_fused(q_BHTK, v_BGSV):
        # Torch's kernel reads shared keys and values where they are: a sixth less time than for copies of them.
        attend = F.scaled_dot_product_attention
        return attend(q_BHTK, k_BGSK, v_BGSV, is_causal=True, scale=scale, enable_gqa=True)
    k_BHSK, v_BHSV = (per_head(x, num_heads) for x in (k_BGSK, v_BGSV))
    if num_queries == 1 and (mask_B1TS is not None or k_BHSK.shape[2] > 1):
        # On a CPU, torch's fused attention takes twice the time for a single query.
        return masked_scores(q_BHTK, k_BHSK, scale, mask_B1TS).softmax(dim=-1) @ v_BHSV
    if mask_B1TS is not None:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, attn_mask=mask_B1TS.to(q_BHTK.dtype), scale=scale)
    if is_fused(q_BHTK, v_BHSV):
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, is_causal=True, scale=scale)
    num_positions = q_BHTK.shape[2]
    hidden_TS = q_BHTK.new_full((num_positions, num_positions), -math.inf).triu(diagonal=1)
    if prefers_hand_written(q_BHTK):
        return _CausalAttention.apply(q_BHTK, k_BHSK, v_BHSV, hidden_TS, scale)
    return ((q_BHTK * scale) @ k_BHSK.mT + hidden_TS).softmax(dim=-1) @ v_BHSV


def is_fused(q_BHTK: Tensor, v_BHSV: Tensor) -> bool:
    """Return whether torch's fused attention is the faster way for the device, the type and the length."""
    if q_BHTK.device.type != "cpu":
        return True
    # On a CPU, torch has no fused attention for values of another width than the keys.
    min_positions = BFLOAT16_FUSED_MIN_POSITIONS if q_BHTK.dtype == torch.bfloat16 else 0
    return q_BHTK.shape[-1] == v_BHSV.shape[-1] and q_BHTK.shape[2] >= min_positions


class _CausalAttention(Function):
    """Attention by products of small matrices, one for each head of each sequence, in the type of the queries.

    `torch.autocast` would compute the softmax, and keep it, in float32. The softmax of bfloat16 sums in float32.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, hidden_TS: Tensor, scale: float) -> Tensor:
        # N is B * H, as the batched product wants it.
        q_NTK, k_NSK, v_NSV = (x.flatten(0, 1) for x in (q_BHTK, k_BHSK, v_BHSV))
        with torch.autocast(q_BHTK.device.type, enabled=False):
            scores_NTS = torch.baddbmm(hidden_TS, q_NTK, k_NSK.mT, alpha=scale)
            pattern_NTS = scores_NTS.softmax(dim=-1)
            z_NTV = pattern_NTS @ v_NSV
        ctx.save_for_backward(q_NTK, k_NSK, v_NSV, pattern_NTS)
        ctx.num_heads, ctx.scale = q_BHTK.shape[1], scale
        return z_NTV.unflatten(0, (-1, ctx.num_heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHTV: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_NTK, k_NSK, v_NSV, pattern_NTS = ctx.saved_tensors
        gradient_NTV = gradient_BHTV.flatten(0, 1)
        # The softmax's gradient, P * (dP - sum(P * dP)), as one pass; scaled as the scores were.
        scores_NTS = torch.ops.aten._softmax_backward_data(gradient_NTV @ v_NSV.mT, pattern_NTS, -1, pattern_NTS.dtype)
        scores_NTS.mul_(ctx.scale)
        to_heads = (scores_NTS @ k_NSK, scores_NTS.mT @ q_NTK, pattern_NTS.mT @ gradient_NTV)
        q_BHTK, k_BHSK, v_BHSV = (x.unflatten(0, (-1, ctx.num_heads)) for x in to_heads)
        return q_BHTK, k_BHSK, v_BHSV, None, None


def gated_silu(branches_BTF: Tensor) -> Tensor:
    """Return `silu(gate) * linear` of the two branches side by side: (B, T, 2 F) to (B, T, F)."""
    if prefers_hand_written(branches_BTF) and torch.is_grad_enabled():
        return _GatedSilu.apply(branches_BTF)
    gate_BTF, linear_BTF = branches_BTF.chunk(2, dim=-1)
    return F.silu(gate_BTF) * linear_BTF


class _GatedSilu(Function):
    """`gated_silu`; the backward fills one tensor for both halves."""

    @staticmethod
    def forward(ctx: Any, branches: Tensor) -> Tensor:
        gate, linear = branches.chunk(2, dim=-1)
        activation = F.silu(gate)
        ctx.save_for_backward(branches, activation)
        return activation * linear

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        branches, activation = ctx.saved_tensors
        gate, linear = branches.chunk(2, dim=-1)
        joined = torch.empty_like(branches)
        gate_gradient, linear_gradient = joined.chunk(2, dim=-1)
        torch.mul(gradient, activation, out=linear_gradient)
        torch.ops.aten.silu_backward.grad_input(gradient * linear, gate, grad_input=gate_gradient)
        return joined


def dropout(x: Tensor, rate: float) -> Tensor:
    """Return `x` with each number set to zero with probability `rate`, and divided by `1 - rate` otherwise."""
    if x.device.type != "cpu" or rate == 1.0:
        return F.dropout(x, rate)
    seed = torch.randint(2**63 - 1, ())
    make_mask = dropout_mask_op if torch.compiler.is_compiling() else dropout_mask
    return x * make_mask(seed, x.shape, rate, x.dtype)


def dropout_mask(seed: Tensor, shape: Sequence[int], rate: float, dtype: torch.dtype) -> Tensor:
    """Return what dropout multiplies by: 0 with probability `rate`, else `1 / (1 - rate)`.

    The random words are those of SFC64 (Doty-Humphrey's PractRand), twice as fast as torch's generator on a CPU; each
    gives four numbers of 16 bits.

    Args:
        rate: More than 0 and less than 1.
    """
    numel = math.prod(shape)
    words = np.random.SFC64(int(seed)).random_raw(numel // 4 + 1)
    uniforms = torch.from_numpy(words.view(np.int16))[:numel].view(shape)
    first_kept = min(max(round(rate * 2**16), 1), 2**16 - 1) - 2**15
    # Integers 0 and 1, because booleans are slow to make and slower to convert.
    is_kept = uniforms.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1)
    return is_kept.to(dtype).mul_(1.0 / (1.0 - rate))


# For the compiler, which cannot trace numpy and makes slow code of 16-bit numbers.
dropout_mask_op = library.custom_op("lumiere::dropout_mask", dropout_mask, mutates_args=(), device_types="cpu")


@dropout_mask_op.register_fake
def _(seed: Tensor, shape: Sequence[int], rate: float, dtype: torch.dtype) -> Tensor:
    return seed.new_empty(shape, dtype=dtype)


IGNORED = -100
"""The target of a row that has no loss, as in `torch.nn.functional.cross_entropy`."""

# Logits of one chunk: 8 MB in float32 on a CPU, where smaller ones make the products slower and larger ones leave the
# cache; accelerators want larger products. With a large vocabulary there are still some hundred rows: every chunk adds
# a gradient of the weight's size, which for a few rows takes longer than the products.
CHUNK_LOGITS = {"cpu": 2**21}
CHUNK_LOGITS_ELSEWHERE = 2**26
MIN_CHUNK_ROWS = 512

MAX_SUM = 2.0**64
"""Where the sum of a row's powers is outside 1 / MAX_SUM to MAX_SUM, they are computed again less the row's maximum.

Float32 keeps 24 bits from 2^-126 to 2^128. The sums must stay far inside that range, because the powers and the inverse
of their sum multiply other numbers: below 2^-126 digits are lost, and bfloat16 products on AMX flush to zero. With this
limit, what is lost is at most 2^-62 of a row's sum.
"""

# Powers of 2 are three times as fast to compute as powers of e, so the logits are made in bits.
BITS_A_NAT = math.log2(math.e)


def linear_cross_entropy(x_NE: Tensor, weight_VocabE: Tensor, targets_N: Tensor) -> Tensor:
    """Return `cross_entropy(x @ weight.T, targets, reduction="sum")` in nats, without holding all logits.

    Differentiable once. Under `torch.autocast` the products are in its type; sums over tokens and rows are in float32
    or wider. `targets_N` holds rows of the weight, or `IGNORED`.
    """
    return _LinearCrossEntropy.apply(x_NE, weight_VocabE, targets_N)


@torch.no_grad()
def linear_cross_entropy_losses(x_NE: Tensor, weight_VocabE: Tensor, targets_N: Tensor) -> Tensor:
    """Return each row's cross-entropy in nats, (N,), 0 where the target is `IGNORED`; without gradients."""
    chunks = chunks_of_powers(x_NE * BITS_A_NAT, weight_VocabE, targets_N)
    return torch.cat([chunk.losses * chunk.is_real for chunk in chunks]).squeeze(1)


class Chunk(NamedTuple):
    """Some rows, and what is computed from their logits."""

    x: Tensor
    """(M, E), times `BITS_A_NAT`."""
    rows: Tensor
    """(M, 1), the target's row of the weight; any row if the target is `IGNORED`."""
    is_real: Tensor
    """(M, 1), False if the target is `IGNORED`."""
    losses: Tensor
    """(M, 1), in nats; any number where `is_real` is False."""
    powers: Tensor
    """(M, Vocab), the probabilities times `sums`; valid until the next chunk."""
    sums: Tensor
    """(M, 1), of the powers."""


def chunks_of_powers(x_NE: Tensor, weight_VocabE: Tensor, targets_N: Tensor) -> Iterator[Chunk]:
    """Yield the rows in chunks, whose logits share one piece of memory. `x_NE` is times `BITS_A_NAT`."""
    is_cpu = x_NE.device.type == "cpu"
    size = max(MIN_CHUNK_ROWS, CHUNK_LOGITS.get(x_NE.device.type, CHUNK_LOGITS_ELSEWHERE) // len(weight_VocabE))
    memory = x_NE.new_empty(min(size, len(x_NE)), len(weight_VocabE))
    is_real_N1 = (targets_N != IGNORED).unsqueeze(1)
    rows_N1 = targets_N.unsqueeze(1) * is_real_N1
    for x_ME, rows_M1, is_real_M1 in zip(*(tensor.split(size) for tensor in (x_NE, rows_N1, is_real_N1)), strict=True):
        logits = torch.mm(x_ME, weight_VocabE.T, out=memory[: len(x_ME)])
        sums_M1, losses_M1 = exponentiate_(logits, rows_M1, subtracts_max=not is_cpu)
        # Logits that need their maximum subtracted are so rare that checking the sums is cheaper than two more passes
        # over all logits; on an accelerator a check would make the host wait.
        if is_cpu and not ((sums_M1 > 1 / MAX_SUM) & (sums_M1 < MAX_SUM)).all():  # NaN fails as well
            highest_M1 = torch.mm(x_ME, weight_VocabE.T, out=logits).amax(1, keepdim=True)
            # Subtract inside the product, before it is rounded: at 130 bits, bfloat16 has steps of 1. That maximum is
            # rounded too, so `exponentiate_` subtracts what is left of it.
            torch.addmm(-highest_M1, x_ME, weight_VocabE.T, out=logits)
            sums_M1, losses_M1 = exponentiate_(logits, rows_M1, subtracts_max=True)
        yield Chunk(x_ME, rows_M1, is_real_M1, losses_M1, logits, sums_M1)


def exponentiate_(logits_MV: Tensor, rows_M1: Tensor, subtracts_max: bool) -> tuple[Tensor, Tensor]:
    """Replace logits in bits by powers of 2; return each row's sum of them, and its loss in nats: (M, 1) each."""
    target_bits_M1 = logits_MV.gather(1, rows_M1)
    shift_M1 = logits_MV.amax(1, keepdim=True) if subtracts_max else 0.0
    if subtracts_max:
        logits_MV.sub_(shift_M1)
    sums_M1 = logits_MV.exp2_().sum(1, keepdim=True, dtype=torch.promote_types(logits_MV.dtype, torch.float32))
    return sums_M1, (sums_M1.log2() + shift_M1 - target_bits_M1) / BITS_A_NAT


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, weight_VocabE: Tensor, targets_N: Tensor) -> Tensor:
        ctx.dtypes = (x_NE.dtype, weight_VocabE.dtype)
        device = x_NE.device.type
        x_NE = x_NE * BITS_A_NAT  # before it is rounded
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_NE, weight_VocabE = x_NE.to(dtype), weight_VocabE.to(dtype)
        sum_dtype = torch.promote_types(x_NE.dtype, torch.float32)
        # Of frozen weights there is no gradient to compute.
        needs_x, needs_weight, _ = ctx.needs_input_grad
        gradients_ME: list[Tensor] = []
        gradient_VocabE = None
        if needs_weight:
            gradient_VocabE = torch.zeros(weight_VocabE.shape, dtype=sum_dtype, device=x_NE.device)
        # Buffers for the products of a chunk, where their type is not that of the sums.
        memory = None
        if gradient_VocabE is not None and x_NE.dtype != sum_dtype:
            memory = torch.empty_like(weight_VocabE), torch.empty_like(gradient_VocabE)
        loss = torch.zeros((), dtype=sum_dtype, device=x_NE.device)
        with torch.autocast(device, enabled=False):
            for chunk in chunks_of_powers(x_NE, weight_VocabE, targets_N):
                loss += (chunk.losses * chunk.is_real).sum()
                # The gradient of the logits is the probabilities, powers / sums, less 1 at the target. Subtract in the
                # type of the sums: near 1 bfloat16 has too few digits. Divide outside the products: dividing the
                # powers would be another pass over the logits. Not `scatter_`, which copies bfloat16 to float32.
                gradient = chunk.powers
                targets = (torch.arange(len(gradient), device=x_NE.device).unsqueeze(1), chunk.rows)
                gradient[targets] = (gradient[targets] - chunk.sums).to(x_NE.dtype)
                share_M1 = (chunk.is_real / chunk.sums).to(x_NE.dtype)
                if needs_x:
                    gradients_ME.append((gradient @ weight_VocabE).mul_(share_M1))
                if gradient_VocabE is None:
                    continue
                x_ME = chunk.x * (share_M1 / BITS_A_NAT)
                if memory is None:
                    gradient_VocabE.addmm_(gradient.T, x_ME)
                else:
                    # Convert, then add: adding one type to another is slower than both.
                    product_VocabE, widened_VocabE = memory
                    widened_VocabE.copy_(torch.mm(gradient.T, x_ME, out=product_VocabE))
                    gradient_VocabE += widened_VocabE
        ctx.save_for_backward(torch.cat(gradients_ME) if needs_x else None, gradient_VocabE)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_x, of_weight = (
            None if kept is None else (kept * gradient).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return of_x, of_weight, None
