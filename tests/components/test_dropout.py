"""Dropout: how often, by how much, and that a seed repeats it."""

import pytest
import torch
from torch import library

from lumiere.components.kernels import factors, factors_op, kept
from lumiere.components.layers import Dropout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_as_many_as_asked_for_and_the_mean_stays(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factors = kept(torch.empty(400, 500, dtype=dtype), share)
    assert factors.dtype == dtype
    is_zero = factors == 0
    # Five standard deviations of a binomial of 200,000 tosses.
    assert abs(is_zero.double().mean().item() - share) <= 5 * (share * (1 - share) / 200_000) ** 0.5 + 2**-17
    assert torch.equal(factors[~is_zero].unique(), torch.tensor([1 / (1 - share)], dtype=dtype))


def test_neighbouring_coins_are_independent() -> None:
    torch.manual_seed(1)
    is_zero = kept(torch.empty(1_000_000), 0.5) == 0
    for distance in (1, 2, 3, 4):  # four coins come from one random word
        both = (is_zero[distance:] & is_zero[:-distance]).double().mean().item()
        assert both == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 1e6) ** 0.5 * 1.5)


@pytest.mark.parametrize("shape", [(1,), (3, 3), (2, 5, 7), (0, 4)])
def test_every_shape_and_the_seed_repeats_it(shape: tuple[int, ...]) -> None:
    dropout, x = Dropout(0.5), torch.ones(shape)
    torch.manual_seed(2)
    first = dropout(x)
    torch.manual_seed(2)
    assert first.shape == shape
    assert torch.equal(dropout(x), first)


def test_evaluation_and_no_share_leave_all_and_a_full_share_nothing() -> None:
    x = torch.randn(8, 8)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros(8, 8))
    # The nearest share to 1 that is none still gives finite numbers.
    assert torch.isfinite(Dropout(1 - 1e-9)(x)).all()


def test_the_gradient_passes_where_the_number_did() -> None:
    x = torch.ones(100, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_what_a_compiler_calls_tosses_the_same_coins() -> None:
    arguments = (torch.tensor(7), (3, 5), 0.3, torch.bfloat16)
    library.opcheck(factors_op, arguments)  # its fake twin gives the same shape and type, and it changes no argument
    assert torch.equal(factors_op(*arguments), factors(*arguments))
