"""What is shared out among processes, looked at in a group of one: the same functions, with nobody to send to."""

import shutil
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from lumiere.config.schema import RunConfig
from lumiere.data.batches import batch_at, batches_in_order
from lumiere.data.dataset import tokenize_corpus
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.errors import CheckpointError
from lumiere.evaluation.loss import evaluate
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.manifest import GROUPS
from lumiere.persistence.runs import RunStore
from lumiere.training.loss import Objective, summed_loss
from lumiere.training.parallel import (
    apply_to_full,
    distribute_like,
    evaluating,
    full_tensor,
    gather_checkpoint,
    is_dtensor,
    local_rows,
    parallelize,
    rows_of,
    shard_shape,
)
from lumiere.training.state import TrainingState, new_model
from lumiere.training.trainer import train_step
from tests.checkpoints import folder_of
from tests.torchrun import assert_close
from tests.training.short import CPU, files_of, short, windows_of


@given(length=st.integers(0, 40), size=st.integers(1, 9))
def test_rows_are_those_of_torch_chunk(length: int, size: int) -> None:
    rows = torch.arange(length)
    chunks = list(rows.chunk(size)) if length else []
    for rank in range(size):
        expected = chunks[rank] if rank < len(chunks) else rows[:0]
        assert torch.equal(rows[rows_of(length, rank, size)], expected)
        assert shard_shape(torch.Size((length, 3)), rank, size) == (len(expected), 3)


def test_alone_everything_is_whole() -> None:
    tensor = torch.arange(6.0).view(3, 2)
    assert full_tensor(tensor) is tensor
    assert torch.equal(distribute_like(tensor, torch.zeros(3, 2)), tensor)
    [doubled] = apply_to_full(lambda tensors: [2 * t for t in tensors], [tensor])
    assert torch.equal(doubled, 2 * tensor)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def config() -> RunConfig:
    return short(optimizer="muon", ema_decay=0.5, parallel="fsdp")


def sharded(config: RunConfig) -> tuple[TrainingState, Objective]:
    """A training whose weights are shared out, though to one process."""
    model = new_model(config)
    # Two, so that they are; the group has one, and nothing else asks the processes.
    objective = parallelize(model, summed_loss, config.training.parallel, CPU, ProcessGroup(0, 2))
    return TrainingState.around(model, config.training), objective


def take_steps(state: TrainingState, objective: Objective, config: RunConfig, steps: int) -> None:
    windows = windows_of(config)
    state.model.train()
    for step in range(state.step, state.step + steps):
        torch.manual_seed(step)
        batch = batch_at(step, windows, config.training.batch_size, config.training.seed)
        train_step(state, batch, 1.0, config.training, torch.float32, objective)
        state.step += 1


def whole(state: TrainingState) -> Checkpoint:
    """A sharded state as it is saved by one process."""
    return gather_checkpoint(state.to_checkpoint({}), SINGLE_PROCESS)


@pytest.mark.usefixtures("group")
def test_a_sharded_state_trains_saves_and_goes_on_as_a_whole_one(config: RunConfig) -> None:
    alone, (state, objective) = TrainingState.create(config, CPU), sharded(config)
    assert all(map(is_dtensor, state.model.parameters()))
    take_steps(alone, summed_loss, config, 3)
    take_steps(state, objective, config, 3)
    saved = whole(state)
    expected = alone.to_checkpoint({})
    assert not any(map(is_dtensor, saved.model.values()))
    assert_close(saved.model, expected.model, 1e-7)
    assert_close(saved.optimizer, expected.optimizer, 1e-7)

    other, its_objective = sharded(config)
    other.restore(expected)
    take_steps(other, its_objective, config, 2)
    take_steps(alone, summed_loss, config, 2)
    assert_close(whole(other).model, alone.to_checkpoint({}).model, 1e-7)


@pytest.mark.usefixtures("group")
def test_another_models_checkpoint_is_refused(config: RunConfig) -> None:
    state, _ = sharded(config)
    model = config.model.model_copy(update={"d_ff": 48})
    other = TrainingState.create(config.model_copy(update={"model": model}), CPU)
    with pytest.raises(CheckpointError, match="does not fit"):
        state.restore(other.to_checkpoint({}))


@pytest.mark.usefixtures("group")
def test_a_process_that_does_not_write_keeps_nothing_that_is_whole(config: RunConfig) -> None:
    state, _ = sharded(config)
    kept = gather_checkpoint(state.to_checkpoint({"run": "run_a"}), ProcessGroup(1, 2))
    assert not kept.model
    assert not kept.optimizer
    assert not kept.rng
    assert kept.metadata["run"] == "run_a"


@pytest.mark.usefixtures("group")
def test_the_average_is_evaluated_and_training_goes_on_with_the_weights(config: RunConfig) -> None:
    """An evaluation in between changes no step, and is that of the average in a model of its own."""
    corpus = tokenize_corpus(config)
    windows, facts = corpus.windows("validation", config), corpus.splits["validation"].facts
    (state, objective), (undisturbed, its_objective) = sharded(config), sharded(config)
    take_steps(state, objective, config, 2)
    with state.averaged_model() as model, evaluating(objective):
        evaluation = evaluate(model, windows, facts, batch_size=8)
    average = new_model(config)
    average.load_state_dict(whole(state).model)
    assert evaluation.loss == evaluate(average, windows, facts, batch_size=8).loss
    assert len(list(batches_in_order(windows, 8))) > 1

    take_steps(state, objective, config, 1)
    take_steps(undisturbed, its_objective, config, 3)
    assert_close(whole(state).optimizer, whole(undisturbed).optimizer, 1e-7)


@pytest.mark.usefixtures("group")
def test_a_folder_is_outlined_first_and_then_each_process_reads_its_rows(config: RunConfig) -> None:
    state, objective = sharded(config)
    take_steps(state, objective, config, 2)
    run, manager = RunStore().create(), CheckpointManager()
    saved = state.to_checkpoint({"run": "run_a"})
    manager.save(run, "latest", saved, SINGLE_PROCESS)
    outlined, name = manager.load_latest(run, outlined=True)
    assert name == "latest"
    assert outlined.metadata == saved.metadata
    assert {group: {name: tensor.shape for name, tensor in getattr(outlined, group).items()} for group in GROUPS} == {
        group: {name: tensor.shape for name, tensor in getattr(saved, group).items()} for group in GROUPS
    }
    assert all(tensor.is_meta for tensor in (outlined.model | outlined.optimizer | outlined.rng).values())

    other, its_objective = sharded(config)
    rows = local_rows(outlined, other.model, SINGLE_PROCESS)
    shared_out = {name for name, tensor in (rows.model | rows.optimizer).items() if is_dtensor(tensor)}
    # All but the counts of AdamW's steps.
    assert shared_out == {name for name, tensor in (saved.model | saved.optimizer).items() if tensor.ndim}
    other.restore(rows)
    take_steps(other, its_objective, config, 1)
    take_steps(state, objective, config, 1)
    assert_close(whole(other).model, whole(state).model, 1e-7)


@pytest.mark.usefixtures("group")
def test_damage_that_one_process_finds_is_an_error_in_all(config: RunConfig) -> None:
    state, _ = sharded(config)
    run, manager = RunStore().create(), CheckpointManager()
    manager.save(run, "latest", state.to_checkpoint({}), SINGLE_PROCESS)
    outlined = manager.load(run, "latest", outlined=True)

    class Failing(ProcessGroup):
        def all_reduce_max(self, value: int) -> int:
            return max(value, 3)

    with pytest.raises(CheckpointError, match="process 2 cannot read its part"):
        local_rows(outlined, state.model, Failing())
    shutil.rmtree(folder_of(run, "latest"))
    with pytest.raises(CheckpointError, match="step-00000000"):
        local_rows(outlined, state.model, SINGLE_PROCESS)


def test_a_folder_that_is_damaged_is_not_outlined(config: RunConfig) -> None:
    run, manager = RunStore().create(), CheckpointManager()
    for seconds in (1.0, 2.0):
        state = TrainingState.create(config, CPU)
        state.seconds = seconds
        manager.save(run, "latest", state.to_checkpoint({}), SINGLE_PROCESS)
    for file in files_of(run):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        manager.load(run, "latest", outlined=True)
    assert manager.load_latest(run, outlined=True)[1] == "previous"
