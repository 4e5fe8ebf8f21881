"""A transformer block: attention, then the feed-forward part, each adding to the residual stream what it read from it.

Shapes: B batch, T position of the query, S position of the key, E embedding_size, H head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumiere.components.hooks import HookPoint
from lumiere.components.kernels import EPSILON, causal_attention, gated_silu, kept, masked_scores, rms_norm


class TokenEmbedding(nn.Module):
    """One table of vectors, read by row on the way in and multiplied by on the way out.

    Args:
        vocab_size: rows, one a token.
        embedding_size: width of a row.
    """

    def __init__(self, vocab_size: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, embedding_size))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Each token's row, (B, T, E)."""
        return F.embedding(tokens_BT, self.weight)

    def unembed(self, residual_BTE: Tensor) -> Tensor:
        """The dot product with every row: logits, (B, T, Vocab)."""
        return F.linear(residual_BTE, self.weight)


ROTARY_BASE = 10_000.0


class LearnedPositions(nn.Module):
    """A learned vector for each position, to be added to the token embeddings.

    Args:
        context_size: number of positions.
        embedding_size: width of a vector.
    """

    def __init__(self, context_size: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context_size, embedding_size))

    def forward(self, positions_T: Tensor) -> Tensor:
        """Each position's vector, (T, E)."""
        return F.embedding(positions_T, self.weight)


class Rotation(NamedTuple):
    """Cosines and sines that turn queries and keys, both (T, 1, K): one row a position, the same for all heads."""

    cos: Tensor
    sin: Tensor


def rotation_at(positions_T: Tensor, d_key: int, dtype: torch.dtype) -> Rotation:
    """The rotations of RoPE (Su et al. 2021, equation 34) at `positions_T`.

    Pair i of a query or key turns by `position * 10000^(-2i / d_key)`. The pairs are (i, i + d_key/2), the "half-split"
    convention of Llama in `transformers`; the paper's pairs are neighbours, the same up to a permutation.

    Args:
        positions_T: whole numbers from 0, of any shape that ends in T.
        d_key: width of queries and keys, even.
        dtype: of the tables; float32 or wider, because an angle grows with the position.
    """
    exponents = torch.arange(0, d_key, 2, dtype=dtype, device=positions_T.device) / d_key
    angles = positions_T[..., None].to(dtype) / ROTARY_BASE**exponents
    angles_T1K = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return Rotation(angles_T1K.cos(), angles_T1K.sin())


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys, turned by their position; same shape and dtype."""
    first, second = x_BTHK.chunk(2, dim=-1)
    quarter_turn_BTHK = torch.cat([-second, first], dim=-1)
    return (x_BTHK * rotation.cos + quarter_turn_BTHK * rotation.sin).to(x_BTHK.dtype)


class Dropout(nn.Module):
    """`x` with a share of its numbers at zero and the others divided by `1 - share`; `x` itself in evaluation.

    On a CPU the coins are tossed with 16 bits each, in a tenth of the time that torch takes, so the probability is
    `share` rounded to a multiple of 2^-16. Their seed is a number of torch's generator, whose seed repeats them.

    Args:
        share: probability of a zero, 0 to 1.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0.0:
            return x
        if x.device.type != "cpu" or self.share == 1.0:
            return F.dropout(x, self.share)
        return x * kept(x, self.share)

    def extra_repr(self) -> str:
        return f"share={self.share}"


class RMSNorm(nn.Module):
    """Divides each position's vector by its root mean square and multiplies by a learned gain.

    Args:
        embedding_size: width of the vectors.
    """

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(embedding_size))

    def forward(self, x_BTE: Tensor) -> Tensor:
        return rms_norm(x_BTE, self.weight)


class WatchedRMSNorm(RMSNorm):
    """RMSNorm with hook points; the one before the output, whose scale attribution of logits freezes.

    `hook_scale` sees s(x), (B, T, 1). `hook_normalized` sees `x / s(x)`, (B, T, E): before the gain, as in
    TransformerLens 4.3.
    """

    def __init__(self, embedding_size: int) -> None:
        super().__init__(embedding_size)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def watch(self, x_BTE: Tensor) -> Tensor:
        """`forward`, through the hook points."""
        scale_BT1 = self.hook_scale((x_BTE.square().mean(-1, keepdim=True) + EPSILON).sqrt())
        return self.hook_normalized(x_BTE / scale_BT1) * self.weight


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


class SwiGLU(nn.Module):
    """`(silu(x W_gate) * (x W_up)) W_down`, at each position alone.

    Hook points, named as in TransformerLens, all (B, T, F): `hook_pre` is the gate before the silu, `hook_pre_linear`
    the linear branch, `hook_post` their product, the neurons' activations.

    Args:
        embedding_size: width of the residual stream.
        d_ff: number of neurons.
    """

    def __init__(self, embedding_size: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(embedding_size, d_ff, bias=False)
        self.up = nn.Linear(embedding_size, d_ff, bias=False)
        self.down = nn.Linear(d_ff, embedding_size, bias=False)
        self.hook_pre = HookPoint()
        self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x_BTE: Tensor) -> Tensor:
        """The fast path: one product for both branches."""
        branches_BTF = F.linear(x_BTE, torch.cat([self.gate.weight, self.up.weight]))
        return self.down(gated_silu(branches_BTF))

    def watch(self, x_BTE: Tensor) -> Tensor:
        """The same, through the hook points."""
        gate_BTF = self.hook_pre(self.gate(x_BTE))
        linear_BTF = self.hook_pre_linear(self.up(x_BTE))
        return self.down(self.hook_post(F.silu(gate_BTF) * linear_BTF))


class WatchedBlock(NamedTuple):
    """What a block read, what it looked at and what it left, with every replacement by a hook in it."""

    resid_pre: Tensor
    """(B, T, E)."""
    pattern: Tensor
    """(B, H, T, S)."""
    resid_post: Tensor
    """(B, T, E)."""


class Block(nn.Module):
    """One layer, normalised before each part (Xiong et al. 2020) by RMSNorm.

    Hook points, all (B, T, E): `hook_resid_pre`, `hook_attn_out`, `hook_resid_mid`, `hook_mlp_out`, `hook_resid_post`.
    The two `_out` are what is added to the stream, so after dropout while training.

    Args:
        embedding_size: width of the residual stream.
        num_heads: attention heads.
        d_key: width of a head's queries and keys.
        d_value: width of a head's values.
        d_ff: neurons of the feed-forward part.
        dropout: share of each part's output that is dropped while training.
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
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, resid_BTE: Tensor, rotation: Rotation | None = None) -> Tensor:
        """The fast path: the residual stream after the block."""
        resid_BTE = resid_BTE + self.dropout(self.attention(self.attention_norm(resid_BTE), rotation))
        return resid_BTE + self.dropout(self.feedforward(self.feedforward_norm(resid_BTE)))

    def watch(self, resid_BTE: Tensor, visible_B1TS: Tensor, rotation: Rotation | None = None) -> WatchedBlock:
        """The same through the hook points; `visible_B1TS` is the mask of `visible_keys`."""
        pre_BTE = self.hook_resid_pre(resid_BTE)
        attention_BTE, pattern_BHTS = self.attention.watch(self.attention_norm(pre_BTE), visible_B1TS, rotation)
        mid_BTE = self.hook_resid_mid(pre_BTE + self.hook_attn_out(self.dropout(attention_BTE)))
        feedforward_BTE = self.feedforward.watch(self.feedforward_norm(mid_BTE))
        post_BTE = self.hook_resid_post(mid_BTE + self.hook_mlp_out(self.dropout(feedforward_BTE)))
        return WatchedBlock(pre_BTE, pattern_BHTS, post_BTE)
