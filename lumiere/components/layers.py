"""The layers of a decoder-only transformer: embeddings, positions, norms, attention, feed-forward part, block.

Each layer has one definition, which takes its variant from the settings (`ModelConfig`). Its hook points are
identities until `lumiere.components.hooks` sets a function on them; the arithmetic is in `lumiere.components.kernels`.

Shapes: B batch, T position of the query, S position of the key, C capacity of a cache, E embedding_size, H head,
G head of keys and values, K d_key, V d_value, F d_ff, R rotated numbers of a head, Vocab vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumiere.components.hooks import HookPoint
from lumiere.components.kernels import attention, dropout, gated_silu, masked_scores, per_head, rms_norm
from lumiere.config.schema import ModelConfig, RotaryScaling
from lumiere.errors import LumiereError


class TokenEmbedding(nn.Module):
    """The token embedding, which is also the output head where the two are tied (Press & Wolf 2017)."""

    def __init__(self, vocab_size: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, embedding_size))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the row of each token, (B, T, E)."""
        return F.embedding(tokens_BT, self.weight)


class LearnedPositions(nn.Module):
    """A learned vector for each position, added to the token embeddings."""

    def __init__(self, context_size: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context_size, embedding_size))

    def forward(self, positions_T: Tensor) -> Tensor:
        """Return the vector of each position, (T, E)."""
        return F.embedding(positions_T, self.weight)


def sinusoids_at(positions_T: Tensor, embedding_size: int, dtype: torch.dtype) -> Tensor:
    """Return the fixed vectors added to the token embeddings (Vaswani et al. 2017, section 3.5), (T, E).

    Numbers 2i and 2i + 1 are the sine and the cosine of `position / 10000^(2i / E)`.
    """
    exponents = torch.arange(0, embedding_size, 2, dtype=dtype, device=positions_T.device) / embedding_size
    angles = positions_T[..., None].to(dtype) / 10_000.0**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :embedding_size]


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines that rotate queries and keys, both (T, 1, R) or (B, T, 1, R), shared by all heads."""


def rotation_at(positions_T: Tensor, settings: ModelConfig, dtype: torch.dtype) -> Rotation:
    """Return the rotations of RoPE (Su et al. 2021, equation 34) at `positions_T`.

    Pair i of the first R numbers of a query or key turns by `position * rotary_base^(-2i / R)`, less if
    `rotary_scaling` stretches its wavelength. The pairs are
    (i, i + R/2), the "half-split" convention of Llama in `transformers`; the paper pairs neighbors, which is the same
    up to a permutation.

    Args:
        positions_T: Integers from 0, of any shape that ends in T.
        settings: With rotary positions.
        dtype: Type of the tables: float32 or wider, because an angle grows with the position.
    """
    size = settings.rotary_size
    exponents = torch.arange(0, size, 2, dtype=dtype, device=positions_T.device) / size
    periods = settings.rotary_base**exponents
    if settings.rotary_scaling is not None:
        periods = periods * stretch(periods, settings.rotary_scaling)
    angles = positions_T[..., None].to(dtype) / periods
    angles_T1R = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return angles_T1R.cos(), angles_T1R.sin()


def stretch(periods: Tensor, scaling: RotaryScaling) -> Tensor | float:
    """Return what the periods of rotary positions (positions per radian) are multiplied by.

    - `linear` (Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation"):
      `factor`.
    - `llama3` (Llama 3.1, as in `transformers`): 1 where more than `high_frequency_factor` turns fit into
      `original_context_size`, `factor` where fewer than `low_frequency_factor` do, and between them the inverse of
      `s + (1 - s) / factor`, with s from 0 to 1 in proportion to the turns.
    """
    if scaling.type == "linear" or scaling.original_context_size is None:
        return scaling.factor
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_context_size / (2 * math.pi * periods)
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / (unscaled + (1 - unscaled) / scaling.factor)


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first R numbers of queries or keys by their position; same shape and type."""
    cos, sin = rotation
    size = cos.shape[-1]
    turned, rest = (x_BTHK, None) if size == x_BTHK.shape[-1] else x_BTHK.tensor_split([size], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BTHK.dtype)
    return turned if rest is None else torch.cat([turned, rest], dim=-1)


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


class Norm(nn.Module):
    """A norm over the last axis: `center(x) / s(x) * weight + bias`, by `settings.norm`.

    - `rms`: RMSNorm (Zhang & Sennrich 2019), `s(x) = sqrt(mean(x^2) + epsilon)`, nothing centered, no bias.
    - `layer`: LayerNorm (Ba et al. 2016), which subtracts the mean first; `layer_plain`, as in OLMo, has no parameters.
    - `none`: the identity, with s(x) = 1.

    With `has_hooks`, `hook_scale` sees s(x), (B, T, 1), and `hook_normalized` sees `center(x) / s(x)`, (B, T, E),
    before the gain, as in TransformerLens 4.3.

    Args:
        kind: One of `ModelConfig.norm`.
        epsilon: Added to the mean square before the root.
    """

    def __init__(self, size: int, kind: str = "rms", epsilon: float = 1e-6, has_hooks: bool = False) -> None:
        super().__init__()
        self.size, self.kind, self.epsilon = size, kind, epsilon
        self.weight = nn.Parameter(torch.ones(size)) if kind in ("rms", "layer") else None
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None
        self.hook_scale = HookPoint() if has_hooks else None
        self.hook_normalized = HookPoint() if has_hooks else None

    def forward(self, x_BTE: Tensor) -> Tensor:
        scale, normalized = self.hook_scale, self.hook_normalized
        if scale is not None and normalized is not None and (scale.is_set or normalized.is_set):
            return self.affine(normalized(self.center(x_BTE) / scale(self.scale(x_BTE))))
        if self.kind == "rms" and self.weight is not None:
            return rms_norm(x_BTE, self.weight, self.epsilon)
        if self.kind == "none":
            return x_BTE
        return F.layer_norm(x_BTE, (self.size,), self.weight, self.bias, self.epsilon)

    def center(self, x_BTE: Tensor) -> Tensor:
        """Return the linear part of what is divided by s(x): x less its mean, or x."""
        return x_BTE - x_BTE.mean(-1, keepdim=True) if self.kind.startswith("layer") else x_BTE

    def scale(self, x_BTE: Tensor) -> Tensor:
        """Return s(x), (B, T, 1)."""
        if self.kind == "none":
            return torch.ones_like(x_BTE[..., :1])
        return (self.center(x_BTE).square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def linear(self, x_BTE: Tensor) -> Tensor:
        """Return what the norm makes of a part of its input, times s of the whole input and without the bias."""
        centered_BTE = self.center(x_BTE)
        return centered_BTE if self.weight is None else centered_BTE * self.weight

    def affine(self, normalized_BTE: Tensor) -> Tensor:
        """Apply gain and bias."""
        if self.weight is not None:
            normalized_BTE = normalized_BTE * self.weight
        return normalized_BTE if self.bias is None else normalized_BTE + self.bias

    def folded(self, weight_NE: Tensor, bias_N: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the matrix and the offset that map `x / s(x)` to what a linear layer makes of the normalized x.

        Gain and centering are linear, so `weight @ norm(x) + bias = folded @ (x / s(x)) + offset`.

        Args:
            weight_NE: Of the linear layer; results have its type.
            bias_N: Of the linear layer.
        """
        offset_N = bias_N
        if self.bias is not None:
            offset_N = weight_NE @ self.bias.to(weight_NE) + (0 if bias_N is None else bias_N)
        gained_NE = weight_NE if self.weight is None else weight_NE * self.weight.to(weight_NE)
        return self.center(gained_NE), offset_N

    def extra_repr(self) -> str:
        return f"{self.size}, kind={self.kind!r}"


class LayerCache(NamedTuple):
    """The part of a `KVCache` that one block's attention reads and writes during one forward pass."""

    keys: Tensor
    """(B, G, C, K)."""
    values: Tensor
    """(B, G, C, V)."""
    where: Tensor | slice
    """Positions that this pass writes: a slice for all rows, or their places in (B, G, C) flattened, (B G T,)."""
    num_keys: int
    """Columns to attend to, S."""

    def append(self, k_BGTK: Tensor, v_BGTV: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values; return those of all S positions, (B, G, S, K) and (B, G, S, V)."""
        for tensor, new in ((self.keys, k_BGTK), (self.values, v_BGTV)):
            if isinstance(self.where, slice):  # a third of the time of an index
                tensor[:, :, self.where] = new
            else:
                tensor.view(-1, tensor.shape[-1]).index_copy_(0, self.where, new.reshape(-1, new.shape[-1]))
        if k_BGTK.shape[2] == self.num_keys:
            return k_BGTK, v_BGTV
        return self.keys[:, :, : self.num_keys], self.values[:, :, : self.num_keys]


@dataclass
class KVCache:
    """Keys and values of the positions that each row of a batch already has.

    A forward pass writes its keys and values from `lengths` on, and leaves `lengths` for the caller to update.

    Attributes:
        keys: (B, G, C, K) per layer, of any strides.
        values: (B, G, C, V) per layer.
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
            starts = torch.arange(0, num_rows * num_heads * capacity, capacity, device=positions.device)
            where = (starts.view(num_rows, num_heads, 1) + positions[:, None]).flatten()
        return [LayerCache(k, v, where, self.num_keys) for k, v in zip(self.keys, self.values, strict=True)]


@dataclass
class ForwardRecord:
    """What a forward pass keeps for `TransformerOutput`."""

    residuals: list[Tensor] = field(default_factory=list)
    """(B, T, E) before each block."""
    patterns: list[Tensor | tuple[Tensor, Tensor, float, Tensor | None]] = field(default_factory=list)
    """(B, H, T, S) of each layer, or what `attention_pattern` computes it from."""


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017): `softmax(scale q k^T) v`, joined by `output`.

    With fewer heads of keys and values than of queries, each serves several query heads: grouped-query attention
    (Ainslie et al. 2023). With `query_key_norm`, queries and keys pass an RMSNorm, as in Qwen3.

    Hook points, named as in TransformerLens: `hook_q`, `hook_k`, `hook_v` (B, T, H or G, K or V) before any norm and
    rotation, `hook_attn_scores` (B, H, T, S) scaled and with -inf where a key is hidden, `hook_pattern` (B, H, T, S),
    and `hook_z` (B, T, H, V), the output of each head before the heads are joined. Scores and pattern exist only while
    one of their hook points is set.
    """

    def __init__(self, settings: ModelConfig) -> None:
        super().__init__()
        size, self.num_heads, self.num_key_value_heads = (
            settings.embedding_size, settings.num_heads, settings.key_value_heads
        )  # fmt: skip
        self.d_key, self.d_value = settings.d_key, settings.d_value
        self.scale = settings.attention_scale or settings.d_key**-0.5
        self._widths = [
            self.num_heads * self.d_key, self.num_key_value_heads * self.d_key, self.num_key_value_heads * self.d_value
        ]  # fmt: skip
        has_bias = settings.bias != "none"
        self.query, self.key, self.value = (nn.Linear(size, width, bias=has_bias) for width in self._widths)
        self.output = nn.Linear(self.num_heads * self.d_value, size, bias=settings.bias == "all")
        self.query_norm = self.key_norm = None
        if settings.query_key_norm:
            self.query_norm, self.key_norm = (Norm(self.d_key, "rms", settings.norm_epsilon) for _ in range(2))
        self.joined: Tensor | None = None  # a copy, set for generation
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
        bias = None
        if self.query.bias is not None:
            bias = torch.cat([self.query.bias, self.key.bias, self.value.bias])
        q, k, v = torch.split_with_sizes(F.linear(x_BTE, self.joined_weight(), bias), self._widths, dim=-1)
        shape = x_BTE.shape[:2]
        q_BTHK = self.hook_q(q.view(*shape, self.num_heads, self.d_key))
        k_BTGK = self.hook_k(k.view(*shape, self.num_key_value_heads, self.d_key))
        v_BTGV = self.hook_v(v.view(*shape, self.num_key_value_heads, self.d_value))
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK).to(q.dtype), self.key_norm(k_BTGK).to(k.dtype)
        if rotation is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rotation), rotate(k_BTGK, rotation)
        q_BHTK, k_BGSK, v_BGSV = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGV.transpose(1, 2)
        if cache is not None:
            k_BGSK, v_BGSV = cache.append(k_BGSK, v_BGSV)
        if self.hook_attn_scores.is_set or self.hook_pattern.is_set:
            scores_BHTS = self.hook_attn_scores(masked_scores(q_BHTK, k_BGSK, self.scale, mask_B1TS))
            pattern_BHTS = self.hook_pattern(scores_BHTS.softmax(dim=-1))
            z_BHTV = pattern_BHTS @ self.per_head(v_BGSV, dim=1)
        else:
            pattern_BHTS = None
            z_BHTV = attention(q_BHTK, k_BGSK, v_BGSV, self.scale, mask_B1TS)
        if record is not None:
            record.patterns.append(
                pattern_BHTS if pattern_BHTS is not None else (q_BHTK, k_BGSK, self.scale, mask_B1TS)
            )
        return F.linear(self.hook_z(z_BHTV.transpose(1, 2)).flatten(-2), self.output.weight, self.output.bias)

    def per_head(self, x: Tensor, dim: int) -> Tensor:
        """Return what each query head sees of keys or values, whose heads are along `dim`."""
        return per_head(x, self.num_heads, dim)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""The activation function of each feed-forward part; `gelu` is exact, `gelu_tanh` GPT-2's approximation."""


class FeedForward(nn.Module):
    """The feed-forward part: `act(x W_gate) * (x W_up)` or `act(x W_up)`, then `W_down`.

    Gated are SwiGLU and GeGLU (Shazeer 2020, equation 6).

    Hook points, named as in TransformerLens, all (B, T, F): `hook_pre` sees what the activation function reads,
    `hook_pre_linear` the other branch where there are two, `hook_post` the neurons' activations.
    """

    def __init__(self, settings: ModelConfig) -> None:
        super().__init__()
        size, d_ff, has_bias = settings.embedding_size, settings.d_ff, settings.bias == "all"
        self.kind = settings.feedforward
        self.gate = nn.Linear(size, d_ff, bias=has_bias) if settings.is_gated else None
        self.up = nn.Linear(size, d_ff, bias=has_bias)
        self.down = nn.Linear(d_ff, size, bias=has_bias)
        self.joined: Tensor | None = None  # a copy, set for generation
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()
        self.hook_pre_linear = HookPoint() if settings.is_gated else None

    def joined_weight(self) -> Tensor:
        """Return the weights that read the residual stream, both branches in one matrix."""
        if self.joined is not None:
            return self.joined
        return self.up.weight if self.gate is None else torch.cat([self.gate.weight, self.up.weight])

    def forward(self, x_BTE: Tensor) -> Tensor:
        bias = self.up.bias
        if self.gate is not None and bias is not None:
            bias = torch.cat([self.gate.bias, bias])
        pre_BTF = F.linear(x_BTE, self.joined_weight(), bias)
        activation = ACTIVATIONS[self.kind]
        if self.hook_pre_linear is None:
            post_BTF = activation(self.hook_pre(pre_BTF))
        else:
            if self.hook_pre.is_set or self.hook_pre_linear.is_set:
                gate_BTF, linear_BTF = pre_BTF.chunk(2, dim=-1)
                pre_BTF = torch.cat([self.hook_pre(gate_BTF), self.hook_pre_linear(linear_BTF)], dim=-1)
            if self.kind == "swiglu":
                post_BTF = gated_silu(pre_BTF)
            else:
                gate_BTF, linear_BTF = pre_BTF.chunk(2, dim=-1)
                post_BTF = activation(gate_BTF) * linear_BTF
        return F.linear(self.hook_post(post_BTF), self.down.weight, self.down.bias)


class Block(nn.Module):
    """One layer: attention, then the feed-forward part, each adding to the residual stream what it read from it.

    Normalized before each part (Xiong et al. 2020). With `parallel_blocks` both parts read the same stream, as in
    GPT-J and GPT-NeoX; with `feedforward: none` there is only attention.

    Hook points, all (B, T, E): `hook_resid_pre`, `hook_attn_out`, `hook_resid_mid`, `hook_mlp_out`, `hook_resid_post`.
    The two `_out` are what is added to the stream: after dropout during training. As in TransformerLens, only a block
    whose feed-forward part reads what attention wrote has a `hook_resid_mid`.
    """

    def __init__(self, settings: ModelConfig) -> None:
        super().__init__()
        make_norm = partial(Norm, settings.embedding_size, settings.norm, settings.norm_epsilon)
        has_feedforward, self.is_parallel = settings.feedforward != "none", settings.parallel_blocks
        self.attention_norm = make_norm()
        self.attention = Attention(settings)
        self.feedforward_norm = make_norm() if has_feedforward else None
        self.feedforward = FeedForward(settings) if has_feedforward else None
        self.dropout = Dropout(settings.dropout)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.hook_resid_mid = HookPoint() if has_feedforward and not self.is_parallel else None
        self.hook_mlp_out = HookPoint() if has_feedforward else None

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
        mid_BTE = resid_BTE + self.hook_attn_out(self.dropout(attention_BTE))
        if self.hook_resid_mid is not None:
            resid_BTE = mid_BTE = self.hook_resid_mid(mid_BTE)
        return self.hook_resid_post(self.add_feedforward(mid_BTE, resid_BTE))

    def add_feedforward(self, resid_BTE: Tensor, read_BTE: Tensor) -> Tensor:
        """Return `resid_BTE` plus what the feed-forward part makes of `read_BTE`."""
        if self.feedforward is None or self.feedforward_norm is None or self.hook_mlp_out is None:
            return resid_BTE
        feedforward_BTE = self.feedforward(self.feedforward_norm(read_BTE))
        return resid_BTE + self.hook_mlp_out(self.dropout(feedforward_BTE))


def feedforward_of(block: Block) -> FeedForward:
    """Return a block's feed-forward part.

    Raises:
        LumiereError: It has none.
    """
    if block.feedforward is None:
        raise LumiereError("the model has no feed-forward parts (model.feedforward: none)", "it has only attention")
    return block.feedforward
