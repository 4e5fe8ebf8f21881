"""Trainings by processes that share the weights out, beside those by one process and by processes that do not."""

import shutil
from pathlib import Path

import pytest
import torch

from lumiere.persistence.runs import Run
from lumiere.training.events import Event, WarningEvent
from lumiere.training.launch import resume
from lumiere.training.preparation import prepare_resume
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
    assert half.record["step"] == 8
    assert tensor_hashes(half, "latest") == tensor_hashes(whole, "latest")

    by_two, by_one = others
    torchrun(2, "--resume", half.id, "--runs-dir", "by-two", *longer, "--set", "training.parallel=ddp")
    assert_same_state(by_two, whole, MUON_TOLERANCE)

    events: list[Event] = []
    result = resume(prepare_resume(by_one, overrides=["training.max_steps=8"]), by_one, [events.append])
    assert result.state.step == 8
    [warning] = [event.message for event in events if isinstance(event, WarningEvent)]
    assert warning.startswith("trained so far with 2 processes (fsdp), now with 1 process:")
