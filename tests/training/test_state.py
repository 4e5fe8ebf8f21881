"""The state of a training: what counts as better, and that all of it survives a file."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lumiere.config.schema import RunConfig
from lumiere.errors import CheckpointError
from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint
from lumiere.persistence.checkpoint_writer import write_checkpoint
from lumiere.training.state import COUNTERS, TrainingState
from tests.training.short import CPU, bits

COUNTS: dict[str, Any] = {
    "step": 7,
    "tokens": 1234,
    "seconds": 5.25,
    "best_loss": 3.5,
    "best_step": 6,
    "stopping_loss": 3.75,
    "epochs_without_improvement": 2,
    "stop_reason": "patience",
    "skipped_steps": 3,
    "skipped_in_a_row": 1,
}


@pytest.fixture
def state(tiny_config: RunConfig) -> TrainingState:
    return TrainingState.create(tiny_config, CPU)


def take_step(state: TrainingState) -> None:
    """An update whose gradients are random, so that it depends on everything that a state holds."""
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizers.step(1.0)


def test_the_seed_decides_the_weights(tiny_config: RunConfig, state: TrainingState) -> None:
    def weights(seed: int) -> torch.Tensor:
        training = tiny_config.training.model_copy(update={"seed": seed})
        created = TrainingState.create(tiny_config.model_copy(update={"training": training}), CPU)
        return created.model.token_embedding.weight

    assert torch.equal(weights(0), state.model.token_embedding.weight)
    assert not torch.equal(weights(1), weights(0))


def test_all_of_it_survives_a_file(tiny_config: RunConfig, state: TrainingState, tmp_path: Path) -> None:
    take_step(state)
    for name, value in COUNTS.items():
        setattr(state, name, value)
    write_checkpoint(tmp_path / "any", state.to_checkpoint({"run": "a"}))
    take_step(state)
    expected = bits(state.model.state_dict())
    numbers = torch.rand(3)

    other = TrainingState.create(tiny_config, CPU)
    torch.rand(5)
    checkpoint = load_checkpoint(tmp_path / "any")
    assert checkpoint.metadata == {"run": "a"} | COUNTS
    other.restore(checkpoint)
    assert {name: getattr(other, name) for name in COUNTERS} == COUNTS
    take_step(other)
    assert bits(other.model.state_dict()) == expected
    assert torch.equal(torch.rand(3), numbers), "the random numbers go on where they were"


def test_what_the_first_version_did_not_count_starts_at_nothing(state: TrainingState) -> None:
    checkpoint = state.to_checkpoint({})
    metadata = {name: COUNTS[name] for name in COUNTS if not name.startswith("skipped")}
    state.skipped_steps = state.skipped_in_a_row = 9
    state.restore(replace(checkpoint, metadata=metadata))
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (7, 0, 0)


def refuse(state: TrainingState, checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError) as caught:
        state.restore(checkpoint)
    assert caught.value.message.isprintable()
    assert caught.value.hint


def test_a_snapshot_or_another_model_cannot_be_restored(tiny_config: RunConfig, state: TrainingState) -> None:
    whole = state.to_checkpoint({})
    refuse(state, Checkpoint(whole.model, metadata=whole.metadata))
    refuse(state, replace(whole, metadata={name: whole.metadata[name] for name in COUNTERS if name != "step"}))
    deeper = tiny_config.model_copy(update={"model": tiny_config.model.model_copy(update={"num_layers": 3})})
    refuse(TrainingState.create(deeper, CPU), whole)


BROKEN: dict[str, list[Any]] = {
    "step": ["7", -1, True, 7.5, None],
    "tokens": [[]],
    "seconds": ["5", math.nan, True],
    "best_loss": [{}],
    "best_step": [1.5],
    "stop_reason": ["done", ["max_steps"]],
    "skipped_steps": [None],
}


def test_broken_counters_and_generators_are_refused(state: TrainingState) -> None:
    whole = state.to_checkpoint({})
    for name, values in BROKEN.items():
        for value in values:
            refuse(state, replace(whole, metadata=whole.metadata | {name: value}))
    for rng in ({"other": torch.zeros(1)}, {"cpu": torch.zeros(3, dtype=torch.uint8)}, {"cpu": torch.zeros(5056)}):
        refuse(state, replace(whole, rng=rng))
    state.restore(whole)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_broken_state_of_the_optimizer_is_refused(tiny_config: RunConfig, optimizer: Any) -> None:
    training = tiny_config.training.model_copy(update={"optimizer": optimizer})
    state = TrainingState.create(tiny_config.model_copy(update={"training": training}), CPU)
    take_step(state)
    whole = state.to_checkpoint({})
    for name, tensor in whole.optimizer.items():
        for value in (tensor.double(), tensor[None], torch.zeros(2, 3, 4)):
            refuse(state, replace(whole, optimizer=whole.optimizer | {name: value}))
        # A parameter has all of its state, or none, as before the first step.
        rest = {other: value for other, value in whole.optimizer.items() if other != name}
        if any(other.rpartition(".")[0] == name.rpartition(".")[0] for other in rest):
            refuse(state, replace(whole, optimizer=rest))
    state.restore(replace(whole, optimizer={}))
    state.restore(whole)


def test_best_is_the_lowest_loss_so_far(state: TrainingState) -> None:
    is_best = []
    for step, loss in enumerate([math.nan, math.inf, 5.0, 5.0, 4.0, math.nan, 4.5, 3.0]):
        state.step = step
        is_best.append(state.record_evaluation(loss))
    assert is_best == [False, False, True, False, True, False, False, True]
    assert (state.best_loss, state.best_step) == (3.0, 7)


@pytest.mark.parametrize(
    ("threshold", "recorded"),
    [
        # The first, too little, exactly the threshold, more, worse, too little, more.
        (0.25, [(5.0, 5.0, 0), (4.875, 5.0, 1), (4.75, 5.0, 2), (4.625, 4.625, 0), (6.0, 4.625, 1), (4.5, 4.625, 2)]),
        (0.25, [(5.0, 5.0, 0), (4.5, 4.5, 0)]),
        # Losses that are not finite are no improvement.
        (0.0, [(math.nan, None, 1), (math.inf, None, 2), (5.0, 5.0, 0), (math.nan, 5.0, 1), (4.0, 4.0, 0)]),
    ],
)
def test_patience_counts_epochs_that_do_not_beat_the_threshold(
    state: TrainingState, threshold: float, recorded: list[tuple[float, float | None, int]]
) -> None:
    for loss, stopping_loss, epochs in recorded:
        state.record_epoch(loss, threshold)
        assert (state.stopping_loss, state.epochs_without_improvement) == (stopping_loss, epochs)
