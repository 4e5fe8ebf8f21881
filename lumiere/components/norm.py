"""RMSNorm (Zhang & Sennrich 2019): `x / s(x) * gain` with `s(x) = sqrt(mean(x^2) + epsilon)`, over the last axis.

Shapes: B batch, T position, E embedding_size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lumiere.components.hooks import HookPoint
from lumiere.device import prefers_hand_written

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
        if prefers_hand_written(x_BTE):
            return _NormalizeAndGain.apply(x_BTE, self.weight)
        return F.rms_norm(x_BTE, self.weight.shape, self.weight, EPSILON)


class _NormalizeAndGain(Function):
    """`F.rms_norm`, forward and backward in half its time on a CPU: fewer and cheaper passes over the stream.

    With n = x / s(x) and g the gradient of n * gain, that of x is `(g gain - n mean(g gain n)) / s(x)`.
    """

    @staticmethod
    def forward(ctx: Any, x_BTE: Tensor, gain_E: Tensor) -> Tensor:
        mean_square_BT1 = torch.linalg.vector_norm(x_BTE, dim=-1, keepdim=True).square_().div_(x_BTE.shape[-1])
        inverse_scale_BT1 = mean_square_BT1.add_(EPSILON).rsqrt_()
        normalized_BTE = x_BTE * inverse_scale_BT1
        ctx.save_for_backward(normalized_BTE, inverse_scale_BT1, gain_E)
        return normalized_BTE * gain_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTE: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        normalized_BTE, inverse_scale_BT1, gain_E = ctx.saved_tensors
        product_BTE = gradient_BTE * normalized_BTE
        gain_gradient_E = product_BTE.flatten(0, -2).sum(0)
        mean_BT1 = (product_BTE @ gain_E).unsqueeze(-1).div_(gain_E.shape[0])
        # In place, and never `addcmul`, which takes as long as four of these passes.
        correction_BTE = torch.mul(normalized_BTE, mean_BT1, out=product_BTE)
        return (gradient_BTE * gain_E).sub_(correction_BTE).mul_(inverse_scale_BT1), gain_gradient_E


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
