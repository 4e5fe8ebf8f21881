"""The feed-forward part of a block: SwiGLU (Shazeer 2020, equation 6), without biases.

Shapes: B batch, T position, E embedding_size, F d_ff.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lumiere.components.hooks import HookPoint


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
        return self.down(F.silu(self.gate(x_BTE)) * self.up(x_BTE))

    def watch(self, x_BTE: Tensor) -> Tensor:
        """`forward`, through the hook points."""
        gate_BTF = self.hook_pre(self.gate(x_BTE))
        linear_BTF = self.hook_pre_linear(self.up(x_BTE))
        return self.down(self.hook_post(F.silu(gate_BTF) * linear_BTF))
