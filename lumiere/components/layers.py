"""The layers of a decoder-only transformer: embeddings, positions, norms, attention, feed-forward part, block.

Each layer has one definition. Its hook points are identities until `lumiere.components.hooks` sets a function on them;
the arithmetic is in `lumiere.components.kernels`.

Shapes: B batch, T position of the query, S position of the key, C capacity of a cache, E embedding_size, H head,
K d_key, V d_value, F d_ff, Vocab vocab_size.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumiere.components.hooks import HookPoint
from lumiere.components.kernels import EPSILON, attention, dropout, gated_silu, masked_scores, rms_norm

ROTARY_BASE = 10_000.0


class TokenEmbedding(nn.Module):
    """The token embedding, which is also the output head (weight tying, Press & Wolf 2017)."""

    def __init__(self, vocab_size: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, embedding_size))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the row of each token, (B, T, E)."""
        return F.embedding(tokens_BT, self.weight)

    def unembed(self, residual_BTE: Tensor) -> Tensor:
        """Return the dot product with every row: logits, (B, T, Vocab)."""
        return F.linear(residual_BTE, self.weight)


class LearnedPositions(nn.Module):
    """A learned vector for each position, added to the token embeddings."""

    def __init__(self, context_size: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context_size, embedding_size))

    def forward(self, positions_T: Tensor) -> Tensor:
        """Return the vector of each position, (T, E)."""
        return F.embedding(positions_T, self.weight)


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines that rotate queries and keys, both (T, 1, K) or (B, T, 1, K), shared by all heads."""


def rotation_at(positions_T: Tensor, d_key: int, dtype: torch.dtype) -> Rotation:
    """Return the rotations of RoPE (Su et al. 2021, equation 34) at `positions_T`.

    Pair i of a query or key turns by `position * 10000^(-2i / d_key)`. The pairs are (i, i + d_key/2), the "half-split"
    convention of Llama in `transformers`; the paper pairs neighbors, which is the same up to a permutation.

    Args:
        positions_T: Integers from 0, of any shape that ends in T.
        d_key: Width of queries and keys; even.
        dtype: Type of the tables: float32 or wider, because an angle grows with the position.
    """
    exponents = torch.arange(0, d_key, 2, dtype=dtype, device=positions_T.device) / d_key
    angles = positions_T[..., None].to(dtype) / ROTARY_BASE**exponents
    angles_T1K = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return angles_T1K.cos(), angles_T1K.sin()


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys by their position; same shape and type."""
    (cos, sin), (first, second) = rotation, x_BTHK.chunk(2, dim=-1)
    return (x_BTHK * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BTHK.dtype)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): zero each number with probability `rate`, divide the others by `1 - rate`.

    The identity in evaluation mode. On a CPU the mask takes 16 random bits per number and a tenth of torch's time, so
    the probability is `rate` rounded to a multiple of 2^-16. Its seed comes from torch's generator.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.rate) if self.training and self.rate else x

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019): `x / s(x) * gain` with `s(x) = sqrt(mean(x^2) + epsilon)`, over the last axis.

    With `has_hooks`, `hook_scale` sees s(x), (B, T, 1), and `hook_normalized` sees `x / s(x)`, (B, T, E), before the
    gain, as in TransformerLens 4.3.
    """

    def __init__(self, embedding_size: int, has_hooks: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(embedding_size))
        self.hook_scale = HookPoint() if has_hooks else None
        self.hook_normalized = HookPoint() if has_hooks else None

    def forward(self, x_BTE: Tensor) -> Tensor:
        scale, normalized = self.hook_scale, self.hook_normalized
        if scale is None or normalized is None or not (scale.is_set or normalized.is_set):
            return rms_norm(x_BTE, self.weight)
        scale_BT1 = scale((x_BTE.square().mean(-1, keepdim=True) + EPSILON).sqrt())
        return normalized(x_BTE / scale_BT1) * self.weight


class LayerCache(NamedTuple):
    """The part of a `KVCache` that one block's attention reads and writes during one forward pass."""

    keys: Tensor
    """(B, H, C, K)."""
    values: Tensor
    """(B, H, C, V)."""
    where: Tensor | slice
    """Positions that this pass writes: a slice for all rows, or their places in (B, H, C) flattened, (B H T,)."""
    num_keys: int
    """Columns to attend to, S."""

    def append(self, k_BHTK: Tensor, v_BHTV: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values; return those of all S positions, (B, H, S, K) and (B, H, S, V)."""
        for tensor, new in ((self.keys, k_BHTK), (self.values, v_BHTV)):
            if isinstance(self.where, slice):  # a third of the time of an index
                tensor[:, :, self.where] = new
            else:
                tensor.view(-1, tensor.shape[-1]).index_copy_(0, self.where, new.reshape(-1, new.shape[-1]))
        if k_BHTK.shape[2] == self.num_keys:
            return k_BHTK, v_BHTV
        return self.keys[:, :, : self.num_keys], self.values[:, :, : self.num_keys]


@dataclass
class KVCache:
    """Keys and values of the positions that each row of a batch already has.

    A forward pass writes its keys and values from `lengths` on, and leaves `lengths` for the caller to update.

    Attributes:
        keys: (B, H, C, K) per layer, of any strides.
        values: (B, H, C, V) per layer.
        lengths: (B,) number of positions in each row, int64; or one number for all rows.
        num_keys: Columns to attend to: at least the longest row after the pass.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor | int
    num_keys: int

    def layers(self, positions: Tensor) -> list[LayerCache]:
        """Return the part of each layer, for a pass over `positions`, (B, T); (T,) where all rows have one length."""
        if isinstance(self.lengths, int):
            where = slice(self.lengths, self.lengths + len(positions))
        else:
            num_rows, num_heads, capacity = self.keys[0].shape[:3]
            starts_BH1 = torch.arange(0, num_rows * num_heads * capacity, capacity, device=positions.device)
            where = (starts_BH1.view(num_rows, num_heads, 1) + positions[:, None]).flatten()
        return [LayerCache(k, v, where, self.num_keys) for k, v in zip(self.keys, self.values, strict=True)]


@dataclass
class ForwardRecord:
    """What a forward pass keeps for `TransformerOutput`."""

    residuals: list[Tensor] = field(default_factory=list)
    """(B, T, E) before each block."""
    patterns: list[Tensor | tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """(B, H, T, S) of each layer, or what `attention_pattern` computes it from."""


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017): `softmax(q k^T / sqrt(d_key)) v`, joined by `output`.

    No biases. Hook points, named as in TransformerLens: `hook_q`, `hook_k`, `hook_v` (B, T, H, K or V) before any
    rotation, `hook_attn_scores` (B, H, T, S) scaled and with -inf where a key is hidden, `hook_pattern` (B, H, T, S),
    and `hook_z` (B, T, H, V), the output of each head before the heads are joined. Scores and pattern exist only while
    one of their hook points is set.
    """

    def __init__(self, embedding_size: int, num_heads: int, d_key: int, d_value: int) -> None:
        super().__init__()
        self.num_heads, self.d_key, self.d_value = num_heads, d_key, d_value
        self.query = nn.Linear(embedding_size, num_heads * d_key, bias=False)
        self.key = nn.Linear(embedding_size, num_heads * d_key, bias=False)
        self.value = nn.Linear(embedding_size, num_heads * d_value, bias=False)
        self.output = nn.Linear(num_heads * d_value, embedding_size, bias=False)
        self.joined: Tensor | None = None  # a copy, set for generation
        self._widths = [num_heads * d_key, num_heads * d_key, num_heads * d_value]
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern, self.hook_z = HookPoint(), HookPoint(), HookPoint()

    def joined_weight(self) -> Tensor:
        """Return the weights of queries, keys and values in one matrix.

        One product copies the weights and is still faster for many tokens: the products are small.
        """
        if self.joined is not None:
            return self.joined
        return torch.cat([self.query.weight, self.key.weight, self.value.weight])

    def forward(
        self,
        x_BTE: Tensor,
        rotation: Rotation | None = None,
        mask_B1TS: Tensor | None = None,
        cache: LayerCache | None = None,
        record: ForwardRecord | None = None,
    ) -> Tensor:
        """Return the output of the joined heads, (B, T, E).

        Args:
            x_BTE: What the heads read.
            rotation: Rotates queries and keys where positions are rotary.
            mask_B1TS: Added to the scores, from `attention_mask`. None: causal; the queries are the last positions.
            cache: Keys and values of earlier positions; receives the new ones.
            record: Receives the pattern.
        """
        q, k, v = torch.split_with_sizes(F.linear(x_BTE, self.joined_weight()), self._widths, dim=-1)
        heads = (*x_BTE.shape[:2], self.num_heads)
        q_BTHK = self.hook_q(q.view(*heads, self.d_key))
        k_BTHK = self.hook_k(k.view(*heads, self.d_key))
        v_BTHV = self.hook_v(v.view(*heads, self.d_value))
        if rotation is not None:
            q_BTHK, k_BTHK = rotate(q_BTHK, rotation), rotate(k_BTHK, rotation)
        q_BHTK, k_BHSK, v_BHSV = q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHV.transpose(1, 2)
        if cache is not None:
            k_BHSK, v_BHSV = cache.append(k_BHSK, v_BHSV)
        if self.hook_attn_scores.is_set or self.hook_pattern.is_set:
            scores_BHTS = self.hook_attn_scores(masked_scores(q_BHTK, k_BHSK, mask_B1TS))
            pattern_BHTS = self.hook_pattern(scores_BHTS.softmax(dim=-1))
            z_BHTV = pattern_BHTS @ v_BHSV
        else:
            pattern_BHTS = None
            z_BHTV = attention(q_BHTK, k_BHSK, v_BHSV, mask_B1TS)
        if record is not None:
            record.patterns.append(pattern_BHTS if pattern_BHTS is not None else (q_BHTK, k_BHSK, mask_B1TS))
        return F.linear(self.hook_z(z_BHTV.transpose(1, 2)).flatten(-2), self.output.weight)


class SwiGLU(nn.Module):
    """The feed-forward part, SwiGLU (Shazeer 2020, equation 6): `(silu(x W_gate) * (x W_up)) W_down`. No biases.

    Hook points, named as in TransformerLens, all (B, T, F): `hook_pre` sees the gate before the silu, `hook_pre_linear`
    the linear branch, `hook_post` their product, the neurons' activations.
    """

    def __init__(self, embedding_size: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(embedding_size, d_ff, bias=False)
        self.up = nn.Linear(embedding_size, d_ff, bias=False)
        self.down = nn.Linear(d_ff, embedding_size, bias=False)
        self.joined: Tensor | None = None  # a copy, set for generation
        self.hook_pre, self.hook_pre_linear, self.hook_post = HookPoint(), HookPoint(), HookPoint()

    def joined_weight(self) -> Tensor:
        """Return the weights of both branches in one matrix."""
        return self.joined if self.joined is not None else torch.cat([self.gate.weight, self.up.weight])

    def forward(self, x_BTE: Tensor) -> Tensor:
        branches_BTF = F.linear(x_BTE, self.joined_weight())
        if self.hook_pre.is_set or self.hook_pre_linear.is_set:
            gate_BTF, linear_BTF = branches_BTF.chunk(2, dim=-1)
            branches_BTF = torch.cat([self.hook_pre(gate_BTF), self.hook_pre_linear(linear_BTF)], dim=-1)
        return F.linear(self.hook_post(gated_silu(branches_BTF)), self.down.weight)


class Block(nn.Module):
    """One layer: attention, then the feed-forward part, each adding to the residual stream what it read from it.

    Normalized before each part (Xiong et al. 2020) by RMSNorm. Hook points, all (B, T, E): `hook_resid_pre`,
    `hook_attn_out`, `hook_resid_mid`, `hook_mlp_out`, `hook_resid_post`. The two `_out` are what is added to the
    stream: after dropout during training.
    """

    def __init__(
        self, embedding_size: int, num_heads: int, d_key: int, d_value: int, d_ff: int, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(embedding_size)
        self.attention = Attention(embedding_size, num_heads, d_key, d_value)
        self.feedforward_norm = RMSNorm(embedding_size)
        self.feedforward = SwiGLU(embedding_size, d_ff)
        self.dropout = Dropout(dropout)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint(), HookPoint()
        self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint()

    def forward(
        self,
        resid_BTE: Tensor,
        rotation: Rotation | None = None,
        mask_B1TS: Tensor | None = None,
        cache: LayerCache | None = None,
        record: ForwardRecord | None = None,
    ) -> Tensor:
        """Return the residual stream after the block. The other arguments are those of `Attention`."""
        resid_BTE = self.hook_resid_pre(resid_BTE)
        if record is not None:
            record.residuals.append(resid_BTE)
        attention_BTE = self.attention(self.attention_norm(resid_BTE), rotation, mask_B1TS, cache, record)
        resid_BTE = self.hook_resid_mid(resid_BTE + self.hook_attn_out(self.dropout(attention_BTE)))
        feedforward_BTE = self.feedforward(self.feedforward_norm(resid_BTE))
        return self.hook_resid_post(resid_BTE + self.hook_mlp_out(self.dropout(feedforward_BTE)))
