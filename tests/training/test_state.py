"""The state of a training: what counts as better, and that all of it survives a file."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lumiere.config.schema import RunConfig
from lumiere.errors import CheckpointError
from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint
from lumiere.persistence.checkpoint_writer import write_checkpoint
from lumiere.training.state import COUNTERS, TrainingState

CPU = torch.device("cpu")
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


def test_every_field_is_saved() -> None:
    names = {field.name for field in fields(TrainingState)} - {"model", "optimizers", "average"}
    assert names == set(COUNTERS) == set(COUNTS)


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
    expected = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    numbers = torch.rand(3)

    other = TrainingState.create(tiny_config, CPU)
    torch.rand(5)
    checkpoint = load_checkpoint(tmp_path / "any")
    assert checkpoint.metadata == {"run": "a"} | COUNTS
    other.restore(checkpoint)
    assert {name: getattr(other, name) for name in COUNTERS} == COUNTS
    take_step(other)
    assert all(torch.equal(other.model.state_dict()[name], weight) for name, weight in expected.items())
    assert torch.equal(torch.rand(3), numbers), "the random numbers go on where they were"


def test_what_the_first_version_did_not_count_starts_at_nothing(state: TrainingState) -> None:
    checkpoint = state.to_checkpoint({})
    metadata = {name: COUNTS[name] for name in COUNTS if not name.startswith("skipped")}
    state.skipped_steps = state.skipped_in_a_row = 9
    state.restore(replace(checkpoint, metadata=metadata))
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (7, 0, 0)


def test_what_cannot_be_restored(tiny_config: RunConfig, state: TrainingState) -> None:
    whole = state.to_checkpoint({})
    with pytest.raises(CheckpointError, match="holds weights only"):
        state.restore(Checkpoint(whole.model, metadata=whole.metadata))
    without_step = {name: value for name, value in whole.metadata.items() if name != "step"}
    with pytest.raises(CheckpointError, match="does not fit the run"):
        state.restore(Checkpoint(whole.model, whole.optimizer, whole.rng, without_step))
    deeper = tiny_config.model_copy(update={"model": tiny_config.model.model_copy(update={"num_layers": 3})})
    with pytest.raises(CheckpointError, match="does not fit the run") as caught:
        TrainingState.create(deeper, CPU).restore(whole)
    assert caught.value.message.isprintable()
    assert "config.yaml" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "7"),
        ("step", -1),
        ("step", True),
        ("step", 7.5),
        ("step", None),
        ("tokens", []),
        ("seconds", "5"),
        ("best_loss", {}),
        ("best_step", 1.5),
        ("stop_reason", "done"),
        ("stop_reason", ["max_steps"]),
        ("skipped_steps", None),
    ],
)
def test_a_counter_that_stands_at_nothing_is_refused(state: TrainingState, name: str, value: Any) -> None:
    whole = state.to_checkpoint({})
    state.restore(whole)
    with pytest.raises(CheckpointError, match="does not fit the run"):
        state.restore(replace(whole, metadata=whole.metadata | {name: value}))


@pytest.mark.parametrize(
    "rng", [{"other": torch.zeros(1)}, {"cpu": torch.zeros(3, dtype=torch.uint8)}, {"cpu": torch.zeros(5056)}]
)
def test_a_generator_without_a_state_is_refused(state: TrainingState, rng: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="does not fit the run"):
        state.restore(replace(state.to_checkpoint({}), rng=rng))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_of_the_optimizer_that_is_none_is_refused(tiny_config: RunConfig, optimizer: Any) -> None:
    training = tiny_config.training.model_copy(update={"optimizer": optimizer})
    state = TrainingState.create(tiny_config.model_copy(update={"training": training}), CPU)
    take_step(state)
    whole = state.to_checkpoint({})
    for name, tensor in whole.optimizer.items():
        wrong = [tensor.double(), tensor[None], torch.zeros(2, 3, 4)]
        for changed in [whole.optimizer | {name: value} for value in wrong]:
            with pytest.raises(CheckpointError, match="does not fit the run"):
                state.restore(replace(whole, optimizer=changed))
        # All that is kept of a parameter, or nothing, as before the first step.
        rest = {other: value for other, value in whole.optimizer.items() if other != name}
        quantities = [other for other in rest if other.rpartition(".")[0] == name.rpartition(".")[0]]
        if quantities:
            with pytest.raises(CheckpointError, match="does not fit the run"):
                state.restore(replace(whole, optimizer=rest))
    state.restore(replace(whole, optimizer={}))
    state.restore(whole)


def test_best_is_the_lowest_loss_so_far(state: TrainingState) -> None:
    noted = []
    for step, loss in enumerate([math.nan, math.inf, 5.0, 5.0, 4.0, math.nan, 4.5, 3.0]):
        state.step = step
        noted.append(state.record_evaluation(loss))
    assert noted == [False, False, True, False, True, False, False, True]
    assert (state.best_loss, state.best_step) == (3.0, 7)


def test_patience_counts_epochs_that_do_not_beat_the_threshold(state: TrainingState) -> None:
    noted = []
    #      first, too little, exactly the threshold, more, worse, too little, more
    for loss in (5.0, 4.875, 4.75, 4.625, 6.0, 4.5, 4.0):
        state.record_epoch(loss, threshold=0.25)
        noted.append((state.stopping_loss, state.epochs_without_improvement))
    assert noted == [(5.0, 0), (5.0, 1), (5.0, 2), (4.625, 0), (4.625, 1), (4.625, 2), (4.0, 0)]


def test_a_loss_that_is_no_number_is_no_improvement(state: TrainingState) -> None:
    noted = []
    for loss in (math.nan, math.inf, 5.0, math.nan, 4.0):
        state.record_epoch(loss, threshold=0.0)
        noted.append((state.stopping_loss, state.epochs_without_improvement))
    assert noted == [(None, 1), (None, 2), (5.0, 0), (5.0, 1), (4.0, 0)]
