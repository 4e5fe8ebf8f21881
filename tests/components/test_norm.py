"""RMSNorm against numbers worked out by hand."""

import pytest
import torch
from torch.autograd import gradcheck

from lumiere.components.layers import RMSNorm, WatchedRMSNorm


@pytest.mark.parametrize("norm_class", [RMSNorm, WatchedRMSNorm])
def test_by_hand(norm_class: type[RMSNorm]) -> None:
    norm = norm_class(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.0]))
    x_BTE = torch.tensor([[[1.0, 7.0, 5.0, 5.0]]])  # the mean of 1, 49, 25, 25 is 25, and so s(x) = 5
    torch.testing.assert_close(norm(x_BTE), torch.tensor([[[0.2, 2.8, -1.0, 0.0]]]))


def test_epsilon_keeps_a_zero_vector_finite_and_damps_a_tiny_one() -> None:
    norm = RMSNorm(2)
    assert torch.equal(norm(torch.zeros(1, 1, 2)), torch.zeros(1, 1, 2))
    tiny_BTE = torch.full((1, 1, 2), 1e-3)  # mean square 1e-6, as much as epsilon
    torch.testing.assert_close(norm(tiny_BTE), torch.full((1, 1, 2), 0.5**0.5))


def test_watching_gives_the_same() -> None:
    norm = WatchedRMSNorm(16).double()
    with torch.no_grad():
        norm.weight.normal_()
    x_BTE = torch.randn(3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(norm.watch(x_BTE), norm(x_BTE), rtol=0, atol=1e-14)


def test_hand_written_gradients_are_those_of_torchs_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = RMSNorm(6).double()
    x_BTE = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x_BTE, norm.weight]
    with torch.no_grad():
        norm.weight.normal_()
    assert gradcheck(lambda x, _: norm(x), inputs)
    weights_BTE = torch.randn(2, 3, 6, dtype=torch.float64)
    mine = torch.autograd.grad((norm(x_BTE) * weights_BTE).sum(), inputs)
    monkeypatch.setattr("lumiere.components.kernels.prefers_hand_written", lambda x: False)
    plain = torch.autograd.grad((norm(x_BTE) * weights_BTE).sum(), inputs)
    for gradient, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)
