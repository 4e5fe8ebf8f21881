"""What a training takes, against what a model, its optimizers, a run's folder and a training really show."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lumiere.config.loader import load_config
from lumiere.config.schema import RunConfig
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.catalog import disk_bytes
from lumiere.training import costs, schedule
from lumiere.training.costs import Parameters
from lumiere.training.events import CheckpointEvent, EvaluationEvent, Event, StartEvent, StepEvent
from lumiere.training.optim import Optimizers
from tests.checkpoints import folder_of

CPU = torch.device("cpu")
# Sizes that are all different, so that none can stand for another.
UNEVEN = {
    "model.embedding_size": 20,
    "model.context_size": 12,
    "model.num_layers": 3,
    "model.num_heads": 5,
    "model.d_key": 6,
    "model.d_value": 7,
    "model.d_ff": 33,
    "model.dropout": 0.0,
    "tokenizer.vocab_size": 301,
}
SHAPES: list[dict[str, Any]] = [{}, UNEVEN, UNEVEN | {"model.positions": "rotary"}, {"model.dropout": 0.5}]


# Parameters


def test_parameters_by_hand() -> None:
    card = costs.count_parameters(load_config("small"))
    assert card == Parameters(
        token_embedding=4096 * 128,
        positions=64 * 128,
        attention=4 * 4 * 128 * 128,
        feedforward=4 * 3 * 128 * 256,
        norms=9 * 128,
    )
    assert card.total == 1_188_992


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model(configure, shape: dict[str, Any]) -> None:
    config = configure(shape)
    parameters, model = costs.count_parameters(config), build_model(config)
    assert parameters.total == model.num_parameters
    parts = {"token_embedding": "token_embedding", "positions": "position_embedding", "norms": "norm"}
    parts |= {"attention": "attention.", "feedforward": "feedforward."}
    for part, name in parts.items():
        found = sum(parameter.numel() for path, parameter in model.named_parameters() if name in path)
        assert getattr(parameters, part) == found, part


# FLOPs


def counted(config: RunConfig, compute: Any) -> int:
    """The FLOPs that torch counts while `compute` uses a model on two windows."""
    model = build_model(config).to(CPU)
    tokens = torch.randint(3, config.tokenizer.vocab_size, (2, config.model.context_size))
    # The counter knows the products of the math backend, and not those of the fused kernel of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute(model, tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_torch_counts(configure, shape: dict[str, Any]) -> None:
    config = configure(shape)
    positions = 2 * config.model.context_size

    def forward(model: Transformer, tokens: torch.Tensor) -> None:
        with torch.no_grad():
            model.logits(tokens)

    def forward_and_backward(model: Transformer, tokens: torch.Tensor) -> None:
        model(tokens).logits.sum().backward()

    assert costs.flops_per_token(config) * positions == 3 * counted(config, forward)
    assert costs.flops_per_token(config) * positions == counted(config, forward_and_backward)


def test_flops_of_the_card_by_palms_formula() -> None:
    # 6 N + 12 L H Q T, where N are all parameters but the positions' and the norms'.
    assert costs.flops_per_token(load_config("small")) == 6 * (1_188_992 - 8192 - 1152) + 12 * 4 * 4 * 32 * 64


# Bytes


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_weights_and_optimizer(configure, shape: dict[str, Any], optimizer: str) -> None:
    config = configure(shape | {"training.optimizer": optimizer})
    model = build_model(config)
    optimizers = Optimizers(model, config.training)
    model.logits(torch.full((1, config.model.context_size), 3)).sum().backward()
    optimizers.step(1.0)
    assert costs.weight_bytes(config) == sum(parameter.nbytes for parameter in model.parameters())
    # AdamW also counts the steps of each parameter, in a number of its own.
    averages = [tensor for tensor in optimizers.state_tensors().values() if tensor.ndim]
    assert costs.optimizer_bytes(config) == sum(tensor.nbytes for tensor in averages)
    averaging = configure(shape | {"training.optimizer": optimizer, "training.ema_decay": 0.9})
    assert costs.optimizer_bytes(averaging) - costs.optimizer_bytes(config) == costs.weight_bytes(config)


@pytest.mark.parametrize("snapshots", [True, False])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_disk_is_what_a_run_takes(configure, launch, optimizer: str, ema_decay: float | None, snapshots: bool) -> None:
    settings = {"optimizer": optimizer, "ema_decay": ema_decay, "max_steps": 9, "snapshots": snapshots}
    config = configure({f"training.{name}": value for name, value in settings.items()})
    run = launch(config).run
    full = disk_bytes(folder_of(run, "latest"))
    sizes = [disk_bytes(folder) for folder in run.checkpoints_dir.glob("snapshots/step-*")]
    estimate = costs.disk(config, total_steps=9)
    assert estimate.num_snapshots == len(sizes) == 5 * snapshots
    # What is left out are headers, counters, manifests and the random numbers' state.
    assert 0 < full - estimate.checkpoint < 30_000
    # At most the latest, the previous, the best and the next one are there at once.
    assert 0 < 4 * full + sum(sizes) - estimate.total < 30_000 * (len(sizes) + 4)


# Steps and evaluations


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "eval_interval"),
    [(12, 9, None), (12, 9, 4), (10, 9, 5), (10, 9, 10), (7, 9, 3), (3, 9, None), (None, 2, 1), (None, 2, 3)],
)
def test_steps_and_evaluations_are_those_of_a_training(
    configure, launch, max_steps: int | None, max_epochs: int, eval_interval: int | None
) -> None:
    changes = {"max_steps": max_steps, "max_epochs": max_epochs, "eval_interval": eval_interval, "patience": None}
    config = configure({f"training.{name}": value for name, value in changes.items()})
    events: list[Event] = []
    result = launch(config, [events.append])
    assert schedule.num_steps(config.training, epoch_steps=5) == result.state.step
    told = [event for event in events if isinstance(event, EvaluationEvent)]
    assert schedule.num_evaluations(config.training, epoch_steps=5) == len(told)


@pytest.mark.parametrize(("patience", "earliest"), [(1, 10), (2, 15), (3, None), (None, None)])
def test_where_nothing_improves_patience_ends_it_at_the_earliest(
    configure, launch, patience: int | None, earliest: int | None
) -> None:
    changes = {"max_steps": None, "max_epochs": 4, "patience": patience, "stopping_threshold": 100.0}
    config = configure({f"training.{name}": value for name, value in changes.items()})
    assert schedule.earliest_stop(config.training, epoch_steps=5) == earliest
    events: list[Event] = []
    launch(config, [events.append])
    assert max(event.step for event in events if isinstance(event, CheckpointEvent)) == (earliest or 20)


# Utilisation


def test_mfu_is_the_share_of_the_measured_peak(configure, launch) -> None:
    config = configure({"training.max_steps": 3, "model.num_layers": 2})
    events: list[Event] = []
    run = launch(config, [events.append]).run
    start, *steps = [event for event in events if isinstance(event, StartEvent | StepEvent)]
    assert isinstance(start, StartEvent)
    assert start.peak_flops == run.record.peak_flops == 2e11
    # Width 16, two blocks of 2 heads of 8 and 32 neurons, 320 tokens, 16 positions.
    flops = 6 * (16 * 320 + 2 * (4 * 16 * 16 + 3 * 16 * 32)) + 12 * 2 * 2 * 8 * 16
    assert len(steps) == 3
    for event in steps:
        assert isinstance(event, StepEvent)
        assert event.mfu == pytest.approx(event.tokens_per_second * flops / 2e11)
