"""Trainings by processes that share the weights out, beside those by one process and by processes that do not."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run
from lumiere.training.events import Event, WarningEvent
from lumiere.training.run import resume
from lumiere.training.setup import set_up_resume
from tests.checkpoints import folder_of
from tests.torchrun import (
    CONSTANT,
    MUON_TOLERANCE,
    NO_DROPOUT,
    assert_same_state,
    assert_same_training,
    tensors,
    torchrun,
    trained,
)

pytestmark = pytest.mark.slow

EVERYTHING = {
    "training.optimizer": "muon",
    "training.ema_decay": 0.9,
    "training.gradient_accumulation_steps": 2,
    "training.gradient_clip_norm": 0.5,
    "training.activation_checkpointing": True,
}
FSDP = {"training.parallel": "fsdp"}


def test_uneven_shares_of_the_weights_train_what_one_process_does(configure, launch) -> None:
    """With all that has a state of its own. Neither the width nor the number of Muon's matrices divides by three."""
    config = configure(NO_DROPOUT | EVERYTHING | FSDP | {"training.batch_size": 12})
    run = trained(3, config)
    assert_same_training(run, launch(config).run, MUON_TOLERANCE)


def test_bfloat16_has_the_same_masters_as_with_all_weights_in_each_process(configure) -> None:
    """With bfloat16, one process' larger batch rounds elsewhere than two smaller ones: so beside two."""
    config = {"training.precision": "bfloat16", "training.optimizer": "muon", "training.gradient_clip_norm": None}
    sharded, whole = trained(2, configure(config | FSDP)), trained(2, configure(config))
    found, expected = tensors(sharded), tensors(whole)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # To the bit: two numbers have one sum, whoever adds them, and nothing is clipped.
        assert torch.equal(found[name], tensor), name


def test_blocks_may_be_compiled(configure, launch) -> None:
    config = configure(NO_DROPOUT | FSDP | {"training.compile": True})
    assert_same_training(trained(2, config), launch(config).run, MUON_TOLERANCE)


def test_a_run_goes_on_exactly_and_in_either_way_from_the_same_checkpoint(configure, tensor_hashes) -> None:
    """With dropout and an average of the weights."""
    settings = CONSTANT | {"training.optimizer": "muon", "training.ema_decay": 0.9}
    whole = trained(2, configure(settings | FSDP))
    half = trained(2, configure(settings | FSDP | {"training.max_steps": 4}))
    others = [Run(Path(folder) / half.name) for folder in ("by-two", "by-one")]
    for other in others:
        shutil.copytree(half.path, other.path)

    longer = ["--set", "training.max_steps=8"]
    torchrun(2, "--resume", half.id, "--runs-dir", str(half.path.parent), *longer)
    assert half.record.step == 8
    assert tensor_hashes(half, "latest") == tensor_hashes(whole, "latest")

    by_two, by_one = others
    torchrun(2, "--resume", half.id, "--runs-dir", "by-two", *longer, "--set", "training.parallel=ddp")
    assert_same_state(by_two, whole, MUON_TOLERANCE)

    events: list[Event] = []
    result = resume(set_up_resume(by_one, overrides=["training.max_steps=8"]), by_one, [events.append])
    assert result.state.step == 8
    [warning] = [event.message for event in events if isinstance(event, WarningEvent)]
    assert warning.startswith("trained so far with 2 processes (fsdp), now with 1 process:")


def loaded(run: Run) -> dict[str, torch.Tensor]:
    """All tensors of the latest checkpoint in either form, read by this process alone."""
    checkpoint = CheckpointManager(run.path.parent).load(run, "latest")
    groups = {"model": checkpoint.model, "optimizer": checkpoint.optimizer}
    return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def test_a_checkpoint_that_is_too_large_for_one_process_is_a_folder_to_go_on_from(configure) -> None:
    """With as many processes to the bit, also where the newest one is damaged; with another number and one as ever."""
    settings = configure(NO_DROPOUT | CONSTANT | FSDP | {"training.optimizer": "muon", "training.ema_decay": 0.9})
    gathered = trained(2, settings)
    expected = loaded(gathered)
    short = settings.training.model_copy(update={"gather_limit_gb": 0.0, "max_steps": 4, "checkpoint_interval": 2})
    run = trained(2, settings.model_copy(update={"training": short}), runs_dir="folders")
    assert {file.name.split("-")[1] for file in folder_of(run, "latest").glob("*.safetensors")} == {"00001", "00002"}
    assert [name for name in CheckpointManager("folders").names(run) if name.startswith("step-")][-1] == "step-00000004"
    others = [Run(Path(folder) / run.name) for folder in ("damaged", "by-four", "by-one")]
    for other in others:
        shutil.copytree(run.path, other.path)
    damaged, by_four, by_one = others
    with next(folder_of(damaged, "latest").glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")

    longer = ["--set", "training.max_steps=8"]
    for resumed, num_processes in ((run, 2), (damaged, 2), (by_four, 4)):
        torchrun(num_processes, "--resume", run.id, "--runs-dir", str(resumed.path.parent), *longer)
        found = loaded(resumed)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            tolerance = 0.0 if num_processes == 2 else MUON_TOLERANCE
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)
    assert damaged.record.resumes[0]["step"] == 2

    resume(set_up_resume(by_one, overrides=["training.max_steps=8", "training.parallel=ddp"]), by_one)
    for name, tensor in loaded(by_one).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=MUON_TOLERANCE)
    assert (folder_of(by_one, "latest") / "model.safetensors").is_file()
