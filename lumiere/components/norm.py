"""RMSNorm (Zhang & Sennrich 2019): `x / s(x) * gain` with `s(x) = sqrt(mean(x^2) + epsilon)`, over the last axis.

Shapes: B batch, T position, E embedding_size.
"""

import torch
from torch import Tensor, nn

from lumiere.components.hooks import HookPoint

EPSILON = 1e-6


class RMSNorm(nn.Module):
    """Divides each position's vector by its root mean square and multiplies by a learned gain.

    Args:
        embedding_size: width of the vectors.
    """

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(embedding_size))

    def forward(self, x_BTE: Tensor) -> Tensor:
        # Written out, forward and backward take half the time of `F.rms_norm` on a CPU.
        return x_BTE * torch.rsqrt(x_BTE.square().mean(-1, keepdim=True) + EPSILON) * self.weight


class WatchedRMSNorm(RMSNorm):
    """RMSNorm with hook points; the one before the output, whose scale attribution of logits freezes.

    `hook_scale` sees s(x), (B, T, 1). `hook_normalized` sees what the output head reads, `x / s(x) * gain`, (B, T, E):
    after the gain, as in TransformerLens's RMSNorm.
    """

    def __init__(self, embedding_size: int) -> None:
        super().__init__(embedding_size)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def watch(self, x_BTE: Tensor) -> Tensor:
        """`forward`, through the hook points."""
        scale_BT1 = self.hook_scale((x_BTE.square().mean(-1, keepdim=True) + EPSILON).sqrt())
        return self.hook_normalized(x_BTE / scale_BT1 * self.weight)
