"""Checkpoints by name; at every instant a run has one that can be loaded."""

import errno
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lumiere.errors import CheckpointError, RunNotFoundError
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore
from tests.persistence.watching import watch


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "runs")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return RunStore(tmp_path / "runs").create(datetime(2025, 8, 19, 0, 18, 8))


def checkpoint(step: int) -> Checkpoint:
    values = torch.full((3,), step, dtype=torch.float64)
    return Checkpoint({"weight": values}, {"weight.step": values}, {"cpu": values.byte()}, {"step": step})


def step_of(manager: CheckpointManager, run: Run, name: str) -> int:
    loaded = manager.load(run, name)
    assert loaded.model["weight"].tolist() == [loaded.metadata["step"]] * 3
    return loaded.metadata["step"]


def damage(run: Run, name: str) -> None:
    path = run.checkpoints_dir / f"{name}.safetensors"
    # A new file, not a change in place: `previous` may be the same file under a second name.
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1])


def files(run: Run) -> set[str]:
    return {entry.name for entry in run.checkpoints_dir.iterdir()}


def test_the_model_cards_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Path("runs/run_hiq6ihsb_20250819_001808"))
    run.checkpoints_dir.mkdir(parents=True)
    trained, model = nn.Linear(3, 2), nn.Linear(3, 2)
    moments = {"weight.exp_avg": torch.ones(2, 3)}
    metadata = {"step": 7, "config": {"model": {"num_layers": 4}}}
    CheckpointManager().save(run, "best", Checkpoint(dict(trained.state_dict()), moments, {}, metadata))

    checkpoint_manager = CheckpointManager()
    checkpoint = checkpoint_manager.load_checkpoint("run_hiq6ihsb_20250819_001808", "best")
    model.load_state_dict(checkpoint["model_state_dict"])

    inputs = torch.randn(5, 3)
    assert torch.equal(model(inputs), trained(inputs))
    assert checkpoint["step"] == 7
    assert checkpoint["config"] == {"model": {"num_layers": 4}}
    assert torch.equal(checkpoint["optimizer_state_dict"]["weight.exp_avg"], torch.ones(2, 3))
    assert checkpoint["rng_state"] == {}
    for reference in ("hiq6ihsb", "hi", "latest", run):
        assert checkpoint_manager.load_checkpoint(reference)["step"] == 7


def test_names_come_in_order_and_other_files_do_not(manager: CheckpointManager, run: Run) -> None:
    assert manager.names(run) == []
    for name in ("step-00000512", "step-100000000", "step-99999999", "latest", "latest", "best"):
        manager.save(run, name, checkpoint(1))
    for name in ("notes.txt", "step-5.safetensors", "mine.safetensors", ".best.safetensors.1.tmp"):
        (run.checkpoints_dir / name).write_bytes(b"")
    expected = ["best", "latest", "previous", "step-00000512", "step-99999999", "step-100000000"]
    assert manager.names(run) == manager.names(run.id) == expected


def test_a_snapshot_is_found_by_its_step(manager: CheckpointManager, run: Run) -> None:
    for step in (0, 512, 123456789):
        manager.save(run, f"step-{step:08d}", Checkpoint(checkpoint(step).model, metadata={"step": step}))
    for name, step in {"step-00000512": 512, "512": 512, "00512": 512, "0": 0, "123456789": 123456789}.items():
        assert step_of(manager, run, name) == step
    assert manager.load(run, "512").optimizer == {}
    for name in ("51", "-1", "٥١٢", "9" * 5000):
        with pytest.raises(CheckpointError, match="has no checkpoint"):
            manager.load(run, name)


def test_only_the_groups_asked_for_are_loaded(manager: CheckpointManager, run: Run) -> None:
    manager.save(run, "best", checkpoint(3))
    loaded = manager.load(run, "best", groups=("model",))
    assert loaded.model["weight"].tolist() == [3, 3, 3]
    assert loaded.optimizer == loaded.rng == {}


def test_an_unknown_name_is_an_error_that_lists_the_others(manager: CheckpointManager, run: Run) -> None:
    with pytest.raises(CheckpointError) as caught:
        manager.load(run, "best")
    assert caught.value.message == f"run {run.id} has no checkpoint 'best'"
    assert caught.value.hint == f"it was stopped before its first save: lumiere train --resume {run.id}"
    manager.save(run, "best", checkpoint(1))
    manager.save(run, "latest", checkpoint(2))
    with pytest.raises(CheckpointError) as caught:
        manager.load(run, "bset")
    assert caught.value.message == f"run {run.id} has no checkpoint 'bset'"
    assert caught.value.hint == "it has best, latest; did you mean best?"
    with pytest.raises(RunNotFoundError):
        manager.load("nothing", "best")


def test_a_name_is_never_part_of_a_path(manager: CheckpointManager, run: Run) -> None:
    manager.save(run, "best", checkpoint(1))
    target = run.path / "outside.safetensors"
    target.write_bytes((run.checkpoints_dir / "best.safetensors").read_bytes())
    for name in ("../outside", str(target.with_suffix("")), "./best", "best.safetensors", "", "best\0", "\x1b[31m"):
        for use in (manager.load, manager.remove):
            with pytest.raises(CheckpointError) as caught:
                use(run, name)
            assert caught.value.message == f"run {run.id} has no checkpoint {name!r}"
        with pytest.raises(ValueError, match="is no name for a checkpoint"):
            manager.save(run, name, checkpoint(2))
    assert target.exists()


def test_a_removed_checkpoint_is_gone_and_the_others_stay(manager: CheckpointManager, run: Run) -> None:
    for name in ("best", "step-00000004", "step-00000008"):
        manager.save(run, name, checkpoint(1))
    manager.remove(run, "4")
    manager.remove(run.id, "best")
    assert manager.names(run) == ["step-00000008"]


def test_latest_keeps_the_one_before_it(manager: CheckpointManager, run: Run) -> None:
    manager.save(run, "latest", checkpoint(1))
    assert manager.names(run) == ["latest"]
    for step in (2, 3, 4):
        manager.save(run, "latest", checkpoint(step))
        assert (step_of(manager, run, "latest"), step_of(manager, run, "previous")) == (step, step - 1)
    assert files(run) == {"latest.safetensors", "previous.safetensors"}
    with pytest.raises(ValueError, match="'previous' is no name"):
        manager.save(run, "previous", checkpoint(5))


def test_resuming_falls_back_to_the_one_before_and_says_so(manager: CheckpointManager, run: Run) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint 'latest'"):
        manager.load_latest(run)
    manager.save(run, "latest", checkpoint(1))
    manager.save(run, "latest", checkpoint(2))
    loaded, name = manager.load_latest(run.id)
    assert (loaded.metadata["step"], name) == (2, "latest")
    damage(run, "latest")
    with pytest.raises(CheckpointError, match="is damaged"):
        manager.load(run, "latest")
    loaded, name = manager.load_latest(run)
    assert (loaded.metadata["step"], loaded.model["weight"].tolist(), name) == (1, [1, 1, 1], "previous")
    damage(run, "previous")
    with pytest.raises(CheckpointError, match=r"latest\.safetensors' is damaged"):
        manager.load_latest(run)


SYSTEM_CALLS = ["link", "replace", "fsync", "unlink"]


@pytest.mark.parametrize("damaged", [(), ("latest",), ("previous",)], ids=str)
def test_a_checkpoint_can_be_loaded_at_every_instant_of_a_save(
    manager: CheckpointManager, run: Run, monkeypatch: pytest.MonkeyPatch, damaged: tuple[str, ...]
) -> None:
    manager.save(run, "latest", checkpoint(1))
    manager.save(run, "latest", checkpoint(2))
    for name in damaged:
        damage(run, name)
    seen: list[int] = []
    calls = watch(monkeypatch, SYSTEM_CALLS, lambda: seen.append(manager.load_latest(run)[0].metadata["step"]))
    manager.save(run, "latest", checkpoint(3))
    assert calls == ["link", "fsync", "replace", "fsync", "replace", "unlink", "fsync"]
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (1 if "latest" in damaged else 2, 3)
    assert manager.load_latest(run)[1] == "latest"


@pytest.mark.parametrize("function", SYSTEM_CALLS)
@pytest.mark.parametrize("occurrence", [1, 2, 3])
def test_a_save_that_fails_anywhere_leaves_a_checkpoint_and_the_next_save_works(
    manager: CheckpointManager, run: Run, function: str, occurrence: int
) -> None:
    manager.save(run, "latest", checkpoint(1))
    manager.save(run, "latest", checkpoint(2))
    remaining = [occurrence]
    real = getattr(os, function)

    def fail(*arguments: Any, **options: Any) -> None:
        remaining[0] -= 1
        if remaining[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, function, fail)
        try:
            manager.save(run, "latest", checkpoint(3))
            message = None
        except CheckpointError as error:
            message = error.message
    if function != "unlink":
        assert files(run) == {"latest.safetensors", "previous.safetensors"}
    if message is None:  # nothing failed, or nothing that the save needs
        assert step_of(manager, run, "latest") == 3
    else:
        assert "cannot be written: No space left on device" in message
    assert step_of(manager, run, "latest") in (2, 3)
    assert step_of(manager, run, "previous") in (1, 2)
    manager.save(run, "latest", checkpoint(4))
    assert step_of(manager, run, "latest") == 4
    assert files(run) == {"latest.safetensors", "previous.safetensors"}


def test_a_file_system_without_hard_links_will_do(
    manager: CheckpointManager, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        manager.save(run, "latest", checkpoint(step))
    assert (step_of(manager, run, "latest"), step_of(manager, run, "previous")) == (3, 2)
    assert files(run) == {"latest.safetensors", "previous.safetensors"}


def test_what_a_killed_save_left_behind_is_cleared_by_the_next(manager: CheckpointManager, run: Run) -> None:
    for name in (".latest.safetensors.0a1b2c3d.tmp", ".previous.tmp"):
        (run.checkpoints_dir / name).write_bytes(b"half a checkpoint")
    manager.save(run, "best", checkpoint(1))
    assert files(run) == {"best.safetensors"}
