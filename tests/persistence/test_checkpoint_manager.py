"""Checkpoints by name, as users and the model card call them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lumiere.errors import CheckpointError, RunNotFoundError
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run
from tests.checkpoints import checkpoint
from tests.persistence.shards import flip


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "runs")


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
    for step in (512, 100_000_000, 99_999_999):
        manager.save(run, f"step-{step:08d}", checkpoint(step))
    manager.save(run, "latest", checkpoint(1))
    manager.save(run, ["best", "latest"], checkpoint(2))
    for name in ("notes.txt", "step-5.safetensors", "mine.safetensors", ".best.safetensors.1.tmp"):
        (run.checkpoints_dir / name).write_bytes(b"")
    expected = ["best", "latest", "previous", "step-00000512", "step-99999999", "step-100000000"]
    assert manager.names(run) == manager.names(run.id) == expected


def test_a_snapshot_is_found_by_its_step(manager: CheckpointManager, run: Run) -> None:
    for step in (0, 512, 123_456_789):
        manager.save(run, f"step-{step:08d}", Checkpoint(checkpoint(step).model, metadata={"step": step}))
    manager.save(run, "latest", checkpoint(600))
    for name, step in {"step-00000512": 512, "512": 512, "00512": 512, "0": 0, "123456789": 123_456_789}.items():
        assert manager.load(run, name).step == step
    assert manager.load(run, "512").optimizer == {}
    for name in ("51", "600", "-1", "٥١٢", "9" * 5000):
        with pytest.raises(CheckpointError, match="has no checkpoint"):
            manager.load(run, name)


def test_an_unknown_name_is_an_error_that_lists_the_others(manager: CheckpointManager, run: Run) -> None:
    with pytest.raises(CheckpointError, match="'best'") as caught:
        manager.load(run, "best")
    assert f"lumiere train --resume {run.id}" in (caught.value.hint or "")
    manager.save(run, ["best", "latest"], checkpoint(1))
    with pytest.raises(CheckpointError, match="'bset'") as caught:
        manager.load(run, "bset")
    assert caught.value.hint == "it has best, latest; did you mean best?"
    with pytest.raises(RunNotFoundError):
        manager.load("nothing", "best")


def test_a_name_is_never_part_of_a_path(manager: CheckpointManager, run: Run) -> None:
    manager.save(run, "best", checkpoint(1))
    target = run.path / "outside"
    (run.checkpoints_dir / "step-00000001").rename(target)
    for name in ("../outside", str(target), "./best", "pointers.json", "snapshots", "", "best\0", "\x1b[31m"):
        for use in (manager.load, manager.remove):
            with pytest.raises(CheckpointError) as caught:
                use(run, name)
            assert repr(name) in caught.value.message
        with pytest.raises(ValueError, match="step 2"):
            manager.save(run, name, checkpoint(2))
    for name in ("previous", "step-00000003"):
        with pytest.raises(ValueError, match="step 2"):
            manager.save(run, name, checkpoint(2))
    assert target.exists()


def test_a_removed_checkpoint_is_gone_and_the_others_stay(manager: CheckpointManager, run: Run) -> None:
    manager.save(run, ["best", "latest"], checkpoint(8))
    for step in (4, 8):
        manager.save(run, f"step-{step:08d}", checkpoint(step))
    manager.remove(run, "4")
    manager.remove(run.id, "best")
    assert manager.names(run) == ["latest", "step-00000008"]
    assert manager.load(run, "latest").step == 8


def test_latest_stands_in_for_a_best_that_does_not_exist(manager: CheckpointManager, run: Run) -> None:
    assert manager.resolve(run, "best") == "best"
    manager.save(run, "latest", checkpoint(1))
    assert [manager.resolve(run, name) for name in ("best", "previous", "latest")] == ["latest", "previous", "latest"]
    manager.save(run, "best", checkpoint(1))
    assert manager.resolve(run, "best") == "best"


def test_a_resume_falls_back_to_the_checkpoint_before(manager: CheckpointManager, run: Run) -> None:
    with pytest.raises(CheckpointError, match="'latest'"):
        manager.load_latest(run)
    for names, step in ((["best", "latest"], 1), ("latest", 2), ("latest", 3)):
        manager.save(run, names, checkpoint(step))
    for name, step in (("latest", 3), ("previous", 2), ("best", 1)):
        for outlined in (False, True):
            loaded, found = manager.load_latest(run.id, outlined)
            assert (loaded.step, found) == (step, name)
        flip("optimizer.safetensors")(run.checkpoints_dir / f"step-{step:08d}")
        with pytest.raises(CheckpointError, match=f"step-{step:08d}"):
            manager.load(run, name)
    with pytest.raises(CheckpointError, match="step-00000003"):
        manager.load_latest(run)
