"""Muon against its equations in numpy, with the orthogonalisation by singular values, and against torch's own."""

import numpy as np
import pytest
import torch
from torch import nn

from lumiere.training.optim import Muon, orthogonalize, orthogonalize_each

SHAPES = [(6, 4), (4, 4), (4, 6), (4, 4), (6, 4)]


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """U p(S) V^T: the rounds act on each singular value alone, and these are numbers."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 3, 8), (2, 5, 9)])
def test_orthogonalize_acts_on_the_singular_values_alone(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(*shape, dtype=torch.float64)
    expected = [orthogonalized(matrix.numpy()) for matrix in matrices]
    result = orthogonalize(matrices)
    np.testing.assert_allclose(result.numpy(), np.stack(expected), rtol=0, atol=1e-12)
    singular_values = torch.linalg.svdvals(result)
    assert singular_values.max() < 1.25
    assert orthogonalize(torch.eye(4)[None])[0].diagonal().min() > 0.65


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_matrices_of_one_shape_go_together_and_give_what_each_gives_alone() -> None:
    matrices = [torch.randn(*shape, dtype=torch.float64) for shape in SHAPES]
    for matrix, result in zip(matrices, orthogonalize_each(matrices, torch.float64), strict=True):
        np.testing.assert_allclose(result.numpy(), orthogonalized(matrix.numpy()), rtol=0, atol=1e-12)


def gradients_of(steps: int) -> list[list[torch.Tensor]]:
    return [[torch.randn(*shape, dtype=torch.float64) for shape in SHAPES] for _ in range(steps)]


def taken(muon: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[list[torch.Tensor]]) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone().to(parameter.dtype)
        muon.step()


def test_it_follows_its_equations() -> None:
    parameters = [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in SHAPES]
    weights = [parameter.detach().numpy().copy() for parameter in parameters]
    gradients = gradients_of(3)
    taken(Muon(parameters, lr=0.1, weight_decay=0.3, momentum=0.9, dtype=torch.float64), parameters, gradients)
    for place, (rows, columns) in enumerate(SHAPES):
        weight, momentum = weights[place], np.zeros((rows, columns))
        for step in gradients:
            gradient = step[place].numpy()
            momentum = 0.9 * momentum + 0.1 * gradient
            update = orthogonalized(0.1 * gradient + 0.9 * momentum)
            weight = weight * (1 - 0.1 * 0.3) - 0.1 * max(1, rows / columns) ** 0.5 * update
        np.testing.assert_allclose(parameters[place].detach().numpy(), weight, rtol=0, atol=1e-12)


def test_it_is_torchs_to_the_rounding_of_bfloat16() -> None:
    mine, theirs = ([nn.Parameter(torch.ones(*shape)) for shape in SHAPES] for _ in range(2))
    gradients = gradients_of(4)
    taken(Muon(mine, lr=0.1, weight_decay=0.3), mine, gradients)
    taken(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="original"), theirs, gradients)
    for parameter, expected in zip(mine, theirs, strict=True):
        moved = (expected - 1).norm()
        assert moved > 0.1
        assert torch.dist(parameter, expected) < 0.05 * moved


def test_a_parameter_without_a_gradient_stays() -> None:
    parameters = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))]
    muon = Muon(parameters, lr=0.1, weight_decay=0.3)
    parameters[0].grad = torch.randn(4, 4)
    muon.step()
    assert not torch.equal(parameters[0], torch.ones(4, 4))
    assert torch.equal(parameters[1], torch.ones(4, 4))


def test_only_the_first_step_makes_room_for_the_momentum() -> None:
    parameter = nn.Parameter(torch.randn(4, 6))
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.0)
    made = []
    for _ in range(3):
        parameter.grad = torch.randn(4, 6)
        with torch.profiler.profile() as profile:
            optimizer.step()
        made.append("aten::zeros_like" in {event.key for event in profile.key_averages()})
    assert made == [True, False, False]
