"""AdamW against its equations in numpy, who is moved by Muon, and both across a save."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lumiere.config.schema import RunConfig, TrainingConfig
from lumiere.models.transformer import Transformer, build_model
from lumiere.training.optim import Muon, Optimizers

FACTORS = (0.5, 1.0, 1.0, 0.25, 0.1)
PARTS = {"attention": ("query", "key", "value", "output"), "feedforward": ("gate", "up", "down")}
MATRICES = [f"{part}.{matrix}.weight" for part, matrices in PARTS.items() for matrix in matrices]
MUON = {f"blocks.{layer}.{matrix}" for layer in (0, 1) for matrix in MATRICES}
Gradients = list[dict[str, torch.Tensor]]


def settings(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "learning_rate": 0.03,
        "muon_learning_rate": 0.05,
        "beta1": 0.8,
        "beta2": 0.95,
        "weight_decay": 0.4,
    }
    return TrainingConfig(**values | changes)


@pytest.fixture
def model(tiny_config: RunConfig) -> Transformer:
    return build_model(tiny_config)


@pytest.fixture
def gradients(model: Transformer) -> Gradients:
    """Random ones, for as many steps as there are factors."""
    return [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in FACTORS]


def copied(model: Transformer, config: RunConfig) -> Transformer:
    other = build_model(config)
    other.load_state_dict(model.state_dict())
    return other


def take_steps(model: nn.Module, optimizers: Optimizers, gradients: Gradients, steps: range) -> None:
    for step in steps:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[step][name].clone()
        optimizers.step(FACTORS[step])


def numpy_adamw(
    weight: np.ndarray, gradients: list[np.ndarray], learning_rates: list[float], config: TrainingConfig, decay: float
) -> np.ndarray:
    """Loshchilov & Hutter 2019, algorithm 2."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
        mean = config.beta1 * mean + (1 - config.beta1) * gradient
        square = config.beta2 * square + (1 - config.beta2) * gradient**2
        unbiased_mean = mean / (1 - config.beta1**step)
        unbiased_square = square / (1 - config.beta2**step)
        weight = weight * (1 - rate * decay) - rate * unbiased_mean / (np.sqrt(unbiased_square) + 1e-8)
    return weight


def test_adamw_follows_its_equations_and_decays_matrices_only(model: Transformer, gradients: Gradients) -> None:
    config = settings()
    before = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    take_steps(model, Optimizers(model, config), gradients, range(len(FACTORS)))
    gains = 0
    for name, parameter in model.named_parameters():
        is_gain = name.endswith("norm.weight")
        gains += is_gain
        expected = numpy_adamw(
            before[name],
            [step[name].double().numpy() for step in gradients],
            [config.learning_rate * factor for factor in FACTORS],
            config,
            decay=0.0 if is_gain else config.weight_decay,
        )
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-6, err_msg=name)
    assert gains == 5, "two a block, and the last one"


def test_muon_moves_the_matrices_of_blocks_and_nothing_else(model: Transformer, gradients: Gradients) -> None:
    optimizers = Optimizers(model, settings(optimizer="muon"))
    take_steps(model, optimizers, gradients, range(1))
    names = {name for name, _ in model.named_parameters()}
    assert len(MUON) == 14
    assert names > MUON
    quantities = {name: {key.rpartition(".")[2] for key in mine} for name, mine in by_parameter(optimizers).items()}
    assert quantities == {
        name: {"momentum_buffer"} if name in MUON else {"step", "exp_avg", "exp_avg_sq"} for name in names
    }


def by_parameter(optimizers: Optimizers) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for key in optimizers.state_tensors():
        keys.setdefault(key.rpartition(".")[0], []).append(key)
    return keys


def test_muon_moves_its_matrices_and_the_rest_goes_as_without_it(
    tiny_config: RunConfig, model: Transformer, gradients: Gradients
) -> None:
    config = settings(optimizer="muon")
    direct, without = copied(model, tiny_config), copied(model, tiny_config)
    take_steps(model, Optimizers(model, config), gradients, range(len(FACTORS)))
    take_steps(without, Optimizers(without, settings(optimizer="adamw")), gradients, range(len(FACTORS)))

    weights = dict(direct.named_parameters())
    muon = Muon([weights[name] for name in sorted(MUON)], lr=0.05, weight_decay=0.4)
    for factor, step in zip(FACTORS, gradients, strict=True):
        muon.param_groups[0]["lr"] = 0.05 * factor
        for name in MUON:
            weights[name].grad = step[name]
        muon.step()

    alone = dict(without.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name] if name in MUON else alone[name]), name
        assert not torch.equal(weights[name], alone[name])


@pytest.mark.parametrize(("muon_weight_decay", "expected"), [(None, 0.4), (0.0, 0.0), (0.7, 0.7)])
def test_muons_matrices_decay_at_a_rate_of_their_own(
    model: Transformer, gradients: Gradients, muon_weight_decay: float | None, expected: float
) -> None:
    """Without gradients nothing but the decay moves a weight."""
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    still = [{name: torch.zeros_like(gradient) for name, gradient in step.items()} for step in gradients]
    optimizers = Optimizers(model, settings(optimizer="muon", muon_weight_decay=muon_weight_decay))
    take_steps(model, optimizers, still, range(len(FACTORS)))
    for name, parameter in model.named_parameters():
        rate, decay = (0.05, expected) if name in MUON else (0.03, 0.0 if parameter.ndim == 1 else 0.4)
        share = math.prod(1 - rate * factor * decay for factor in FACTORS)
        torch.testing.assert_close(parameter.double(), share * before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_the_next_steps_are_the_same_to_the_bit_after_a_round_trip(
    tiny_config: RunConfig, model: Transformer, gradients: Gradients, optimizer: str, num_steps: int
) -> None:
    config = settings(optimizer=optimizer)
    first = Optimizers(model, config)
    take_steps(model, first, gradients, range(num_steps))
    other, forgetful = copied(model, tiny_config), copied(model, tiny_config)
    second = Optimizers(other, config)
    saved = {key: tensor.clone() for key, tensor in first.state_tensors().items()}
    second.load_state_tensors(first.state_tensors())

    rest = range(num_steps, len(FACTORS))
    take_steps(other, second, gradients, rest)
    assert_equal(first.state_tensors(), saved)  # the second works on copies
    take_steps(model, first, gradients, rest)
    assert_equal(model.state_dict(), other.state_dict())
    assert_equal(first.state_tensors(), second.state_tensors())

    take_steps(forgetful, Optimizers(forgetful, config), gradients, rest)
    same = [torch.equal(mine, theirs) for mine, theirs in zip(forgetful.parameters(), model.parameters(), strict=True)]
    assert not any(same) if num_steps else all(same)


def assert_equal(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_there_is_no_state_before_the_first_step_and_no_gradient_after_one(
    model: Transformer, gradients: Gradients, optimizer: str
) -> None:
    optimizers = Optimizers(model, settings(optimizer=optimizer))
    assert optimizers.state_tensors() == {}
    take_steps(model, optimizers, gradients, range(1))
    assert by_parameter(optimizers).keys() == {name for name, _ in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
