"""AdamW and Muon against their equations in numpy, Muon against torch's own, and the average of the weights by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lumiere.config.schema import RunConfig, TrainingConfig
from lumiere.errors import CheckpointError
from lumiere.evaluation.loss import evaluate
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.training.optim import Muon, Optimizers, WeightAverage, orthogonalize, orthogonalize_each
from lumiere.training.run import newest_checkpoint
from lumiere.training.setup import set_up
from lumiere.training.state import TrainingState
from tests.training.short import CPU, hashes, short, train

FACTORS = (0.5, 1.0, 1.0, 0.25, 0.1)
MATRICES = [f"attention.{name}" for name in ("query", "key", "value", "output")]
MATRICES += [f"feedforward.{name}" for name in ("gate", "up", "down")]
MUON = {f"blocks.{layer}.{matrix}.weight" for layer in (0, 1) for matrix in MATRICES}
Gradients = list[dict[str, Tensor]]


def settings(**changes: Any) -> TrainingConfig:
    rates = {"learning_rate": 0.03, "muon_learning_rate": 0.05}
    values: dict[str, Any] = rates | {"beta1": 0.8, "beta2": 0.95, "weight_decay": 0.4}
    return TrainingConfig(**values | changes)


@pytest.fixture
def model(tiny_config: RunConfig) -> Transformer:
    return build_model(tiny_config)


@pytest.fixture
def gradients(model: Transformer) -> Gradients:
    """Random ones, one step for each factor."""
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


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# Who updates what


def numpy_adamw(weight: np.ndarray, gradients: list[np.ndarray], config: TrainingConfig, decay: float) -> np.ndarray:
    """Loshchilov & Hutter 2019, algorithm 2."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, (gradient, factor) in enumerate(zip(gradients, FACTORS, strict=True), start=1):
        rate = config.learning_rate * factor
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
    gains = {name for name in before if name.endswith("norm.weight")}
    assert len(gains) == 5, "two per block, and the last one"
    for name, parameter in model.named_parameters():
        steps = [step[name].double().numpy() for step in gradients]
        expected = numpy_adamw(before[name], steps, config, decay=0.0 if name in gains else config.weight_decay)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-6, err_msg=name)


def test_muon_updates_the_matrices_of_blocks_and_adamw_the_rest(
    tiny_config: RunConfig, model: Transformer, gradients: Gradients
) -> None:
    direct, without = copied(model, tiny_config), copied(model, tiny_config)
    optimizers = Optimizers(model, settings(optimizer="muon"))
    take_steps(model, optimizers, gradients, range(len(FACTORS)))
    take_steps(without, Optimizers(without, settings(optimizer="adamw")), gradients, range(len(FACTORS)))

    weights, alone = dict(direct.named_parameters()), dict(without.named_parameters())
    muon = Muon([weights[name] for name in sorted(MUON)], lr=0.05, weight_decay=0.4)
    for factor, step in zip(FACTORS, gradients, strict=True):
        muon.param_groups[0]["lr"] = 0.05 * factor
        for name in MUON:
            weights[name].grad = step[name]
        muon.step()

    assert weights.keys() > MUON
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name] if name in MUON else alone[name]), name
        assert not torch.equal(weights[name], alone[name])
    assert optimizers.state_tensors().keys() == {
        f"{name}.{quantity}"
        for name in weights
        for quantity in (("momentum_buffer",) if name in MUON else ("step", "exp_avg", "exp_avg_sq"))
    }


@pytest.mark.parametrize(("muon_weight_decay", "expected"), [(None, 0.4), (0.0, 0.0), (0.7, 0.7)])
def test_muons_matrices_have_their_own_decay(
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
def test_a_round_trip_of_the_state_keeps_the_next_steps_to_the_bit(
    tiny_config: RunConfig, model: Transformer, gradients: Gradients, optimizer: str, num_steps: int
) -> None:
    config = settings(optimizer=optimizer)
    first = Optimizers(model, config)
    take_steps(model, first, gradients, range(num_steps))
    saved = {key: tensor.clone() for key, tensor in first.state_tensors().items()}
    assert {key.rpartition(".")[0] for key in saved} == {name for name, _ in model.named_parameters() if num_steps}
    assert all(parameter.grad is None for parameter in model.parameters())
    other, forgetful = copied(model, tiny_config), copied(model, tiny_config)
    second = Optimizers(other, config)
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


# Muon

SHAPES = [(6, 4), (4, 4), (4, 6), (4, 4), (6, 4)]


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """U p(S) V^T: the rounds act on each singular value alone, and these are numbers."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


def test_matrices_of_one_shape_are_orthogonalized_together_as_each_alone() -> None:
    matrices = [torch.randn(*shape, dtype=torch.float64) for shape in [*SHAPES, (3, 8), (5, 9)]]
    for matrix, result in zip(matrices, orthogonalize_each(matrices, torch.float64), strict=True):
        np.testing.assert_allclose(result.numpy(), orthogonalized(matrix.numpy()), rtol=0, atol=1e-12)
        assert torch.linalg.svdvals(result).max() < 1.25
    assert orthogonalize(torch.eye(4)[None])[0].diagonal().min() > 0.65
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def random_steps(steps: int) -> list[list[Tensor]]:
    return [[torch.randn(*shape, dtype=torch.float64) for shape in SHAPES] for _ in range(steps)]


def update(muon: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone().to(parameter.dtype)
        muon.step()


def test_muon_follows_its_equations() -> None:
    parameters = [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in SHAPES]
    weights = [parameter.detach().numpy().copy() for parameter in parameters]
    steps = random_steps(3)
    update(Muon(parameters, lr=0.1, weight_decay=0.3, momentum=0.9, dtype=torch.float64), parameters, steps)
    for place, (rows, columns) in enumerate(SHAPES):
        weight, momentum = weights[place], np.zeros((rows, columns))
        for step in steps:
            gradient = step[place].numpy()
            momentum = 0.9 * momentum + 0.1 * gradient
            change = orthogonalized(0.1 * gradient + 0.9 * momentum)
            weight = weight * (1 - 0.1 * 0.3) - 0.1 * max(1, rows / columns) ** 0.5 * change
        np.testing.assert_allclose(parameters[place].detach().numpy(), weight, rtol=0, atol=1e-12)


def test_muon_is_torchs_up_to_the_rounding_of_bfloat16() -> None:
    mine, theirs = ([nn.Parameter(torch.ones(*shape)) for shape in SHAPES] for _ in range(2))
    steps = random_steps(4)
    update(Muon(mine, lr=0.1, weight_decay=0.3), mine, steps)
    update(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="original"), theirs, steps)
    for parameter, expected in zip(mine, theirs, strict=True):
        moved = (expected - 1).norm()
        assert moved > 0.1
        assert torch.dist(parameter, expected) < 0.05 * moved


def test_muon_leaves_a_parameter_without_a_gradient_and_allocates_its_momentum_once() -> None:
    moving, still = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    muon, allocated = Muon([moving, still], lr=0.1, weight_decay=0.3), []
    for _ in range(3):
        moving.grad = torch.randn(4, 4)
        with torch.profiler.profile() as profile:
            muon.step()
        allocated.append("aten::zeros_like" in {event.key for event in profile.key_averages()})
    assert allocated == [True, False, False]
    assert not torch.equal(moving, torch.ones(4, 4))
    assert torch.equal(still, torch.ones(4, 4))


# The average of the weights

DECAY = 0.25
AVERAGED = {"training.ema_decay": DECAY, "training.warmup_steps": 0}


def test_the_average_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(8.0)
    average = WeightAverage(model, decay=0.3)
    expected = 8.0
    # A young average forgets faster; 4/13 and more are capped.
    for step, (weight, decay) in enumerate([(4.0, 2 / 11), (-2.0, 3 / 12), (1.0, 0.3), (0.0, 0.3)], start=1):
        model.weight.data.fill_(weight)
        average.update(step)
        expected = decay * expected + (1 - decay) * weight
        assert average.tensors()["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 0.0, "averaging leaves the weights alone"


def test_the_average_is_applied_in_place_and_removed_also_after_an_error() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.5)
    before = model.weight.detach().clone()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    model.weight.data.add_(1.0)

    def look(error: Exception) -> None:
        with average.applied():
            assert torch.equal(model.weight, before)
            raise error

    with pytest.raises(ZeroDivisionError):
        look(ZeroDivisionError())
    assert torch.equal(model.weight, before + 1.0)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_the_average_is_what_is_evaluated_and_saved() -> None:
    """Snapshots hold the weights themselves."""
    config = short(AVERAGED, max_steps=2, snapshots=True)
    trained, manager = train(config), CheckpointManager()
    start, first, last = (manager.load(trained.run, str(step)).model for step in range(3))
    latest = manager.load(trained.run, "latest")
    assert latest.model.keys() == start.keys()
    for name, average in latest.model.items():
        expected = 2 / 11 * start[name].double() + 9 / 11 * first[name]
        expected = DECAY * expected + (1 - DECAY) * last[name]
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(latest.optimizer[f"trained.{name}"], last[name])

    corpus = set_up(config).corpus
    windows, facts = corpus.windows("validation", config), corpus.splits["validation"].facts
    scored = evaluate(trained.run.load_model("latest"), windows, facts, config.training.batch_size)
    assert scored.loss == pytest.approx(trained.evaluations[-1].evaluation.loss, rel=1e-6)


def test_averaging_changes_no_step_and_cannot_be_switched_on_a_resume() -> None:
    averaged, plain = short(AVERAGED), short(AVERAGED, ema_decay=None)
    runs = [train(config).run for config in (averaged, plain)]
    with_average, without = map(hashes, runs)
    raw = {name.replace("optimizer.trained.", "model."): with_average[name] for name in with_average}
    assert without.items() <= raw.items()
    for run, other in zip(runs, (plain, averaged), strict=True):
        checkpoint, _ = newest_checkpoint(run)
        assert checkpoint is not None
        with pytest.raises(CheckpointError, match="does not fit the run"):
            TrainingState.create(other, CPU).restore(checkpoint)
