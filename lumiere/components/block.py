"""A transformer block: attention, then the feed-forward part, each adding to the residual stream what it read from it.

Shapes: B batch, T position of the query, S position of the key, E embedding_size, H head.
"""

from typing import NamedTuple

from torch import Tensor, nn

from lumiere.components.attention import Attention
from lumiere.components.dropout import Dropout
from lumiere.components.feedforward import SwiGLU
from lumiere.components.hooks import HookPoint
from lumiere.components.norm import RMSNorm
from lumiere.components.positions import Rotation


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
