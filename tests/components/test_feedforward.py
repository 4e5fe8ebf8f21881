"""SwiGLU against numbers worked out by hand."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lumiere.components.layers import SwiGLU


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


def test_hand_written_gradients_are_those_of_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    swiglu = SwiGLU(embedding_size=3, d_ff=5).double()
    x_BTE = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x_BTE, *swiglu.parameters()]
    assert gradcheck(lambda x, *_: swiglu(x), inputs)
    weights_BTE = torch.randn(2, 4, 3, dtype=torch.float64)
    mine = torch.autograd.grad((swiglu(x_BTE) * weights_BTE).sum(), inputs)
    monkeypatch.setattr("lumiere.components.kernels.prefers_hand_written", lambda x: False)
    plain = torch.autograd.grad((swiglu(x_BTE) * weights_BTE).sum(), inputs)
    for gradient, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)
