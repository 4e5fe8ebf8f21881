"""The feed-forward part of a block: SwiGLU (Shazeer 2020, equation 6), without biases.

Shapes: B batch, T position, E embedding_size, F d_ff.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lumiere.components.hooks import HookPoint
from lumiere.device import prefers_hand_written


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
        if prefers_hand_written(branches_BTF):
            return self.down(_GatedSilu.apply(branches_BTF))
        gate_BTF, linear_BTF = branches_BTF.chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * linear_BTF)

    def watch(self, x_BTE: Tensor) -> Tensor:
        """The same, through the hook points."""
        gate_BTF = self.hook_pre(self.gate(x_BTE))
        linear_BTF = self.hook_pre_linear(self.up(x_BTE))
        return self.down(self.hook_post(F.silu(gate_BTF) * linear_BTF))


class _GatedSilu(Function):
    """`silu(gate) * linear` for the two joined, (..., 2 F); the backward fills one tensor for both halves."""

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
