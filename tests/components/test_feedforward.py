"""SwiGLU against numbers worked out by hand."""

import math

import torch

from lumiere.components.feedforward import SwiGLU


def test_by_hand() -> None:
    swiglu = SwiGLU(embedding_size=2, d_ff=2)
    with torch.no_grad():
        swiglu.gate.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        swiglu.up.weight.copy_(torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
        swiglu.down.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, -2.0]]))
    x_BTE = torch.tensor([[[math.log(3), math.log(2)]]])
    # sigmoid(ln 3) = 3/4 and sigmoid(ln 2) = 2/3.
    first = 3 / 4 * math.log(3) * 3 * math.log(2)
    second = 2 / 3 * math.log(2) * math.log(3)
    expected_BTE = torch.tensor([[[first + second, -2 * second]]])
    torch.testing.assert_close(swiglu(x_BTE), expected_BTE)
    torch.testing.assert_close(swiglu.watch(x_BTE), expected_BTE)
