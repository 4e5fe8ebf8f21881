"""One checkpoint takes the place of another, of whatever form, and a kill between any two steps loses none."""

import errno
import os
import shutil
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lumiere.distributed import SINGLE_PROCESS
from lumiere.errors import CheckpointError
from lumiere.persistence import placing
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


def save(run: Run, name: str, step: int, form: str) -> None:
    manager = CheckpointManager(run.path.parent)
    if form == "folder":
        manager.save_shards(run, name, checkpoint(step), SINGLE_PROCESS)
    else:
        manager.save(run, name, checkpoint(step))


def step_of(run: Run, name: str) -> int:
    loaded = CheckpointManager(run.path.parent).load(run, name)
    assert loaded.model["weight"].tolist() == [loaded.metadata["step"]] * 3
    return loaded.metadata["step"]


def steps(run: Run) -> dict[str, int]:
    """The checkpoints that can be loaded."""
    found = {}
    for name in CheckpointManager(run.path.parent).names(run):
        try:
            found[name] = step_of(run, name)
        except CheckpointError:
            continue
    return found


def entries(run: Run) -> set[str]:
    return {entry.name for entry in run.checkpoints_dir.iterdir()}


def damage(run: Run, name: str) -> None:
    path = placing.find(run.checkpoints_dir, name)
    if path.is_dir():
        (path / "checkpoint.json").unlink()
    else:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:-1])


CALLS = ["link", "rename", "replace", "fsync", "mkdir", "unlink", "rmdir"]


FORMS = ("file", "folder")


@pytest.mark.parametrize("damaged", [None, "latest", "previous"])
@pytest.mark.parametrize("forms", [forms for forms in product(FORMS, FORMS, FORMS) if "folder" in forms], ids="-".join)
def test_a_kill_at_any_instant_of_a_save_loses_no_checkpoint(
    run: Run, tmp_path: Path, forms: tuple[str, str, str], damaged: str | None
) -> None:
    save(run, "latest", 1, forms[0])
    save(run, "latest", 2, forms[1])
    if damaged:
        damage(run, damaged)
    states: list[Path] = []
    copytree = shutil.copytree

    def look() -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, real in reals.items():
                patch.setattr(os, name, real)
            states.append(tmp_path / "states" / str(len(states)) / run.name)
            copytree(run.path, states[-1])

    reals = {name: getattr(os, name) for name in CALLS}
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, CALLS, look)
        save(run, "latest", 3, forms[2])
    assert steps(run) == ({"latest": 3} if damaged == "latest" else {"latest": 3, "previous": 2})
    seen = []
    for state in states:
        killed = Run(state)
        manager = CheckpointManager(state.parent)
        found, name = manager.load_latest(killed)
        seen.append((found.step, name))
        # Both are there throughout, but for the one that was damaged.
        assert set(manager.names(killed)) == {"latest", "previous"}
        assert set(steps(killed)) >= {"latest", "previous"} - {damaged} or found.step == 3
        # What is left is cleared away, and nothing else is.
        before = steps(killed)
        placing.clear(killed.checkpoints_dir)
        assert steps(killed) == before
        assert not [entry for entry in entries(killed) if entry.startswith(".")]
        # And the next save, of either form, leaves the run as if nothing had happened.
        for step, form in ((4, "file"), (5, "folder")):
            save(killed, "latest", step, form)
            assert steps(killed)["latest"] == step
            assert not [entry for entry in entries(killed) if entry.startswith(".")]
        assert steps(killed) == {"latest": 5, "previous": 4}
        assert entries(killed) == {"latest", "previous.safetensors"}
    expected = 1 if damaged == "latest" else 2
    assert (seen[0][0], seen[-1]) == (expected, (3, "latest"))
    assert [step for step, _ in seen] == sorted(step for step, _ in seen)
    assert {step for step, _ in seen} <= {expected, 2, 3}


@pytest.mark.parametrize("name", ["best", "step-00000512"])
@pytest.mark.parametrize("forms", [("file", "folder"), ("folder", "file"), ("folder", "folder")], ids="-".join)
def test_a_checkpoint_without_a_previous_one_can_be_loaded_throughout(
    run: Run, monkeypatch: pytest.MonkeyPatch, forms: tuple[str, str], name: str
) -> None:
    save(run, name, 1, forms[0])
    seen = []
    with monkeypatch.context() as patch:
        calls = watch(patch, CALLS, lambda: seen.append(step_of(run, name)))
        save(run, name, 2, forms[1])
    assert calls.count("rename") >= 2
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (1, 2)
    assert entries(run) == {name if forms[1] == "folder" else f"{name}.safetensors"}


@pytest.mark.parametrize("forms", [("file", "folder"), ("folder", "file"), ("folder", "folder")], ids="-".join)
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("occurrence", [1, 2, 3, 4])
def test_a_save_that_fails_anywhere_leaves_what_was_there_and_the_next_one_works(
    run: Run, forms: tuple[str, str], function: str, occurrence: int
) -> None:
    save(run, "latest", 1, forms[0])
    save(run, "latest", 2, forms[0])
    remaining, real = [occurrence], getattr(os, function)

    def fail(*arguments: Any, **options: Any) -> Any:
        remaining[0] -= 1
        if remaining[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    message = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, function, fail)
        try:
            save(run, "latest", 3, forms[1])
        except CheckpointError as error:
            message = error.message
    assert message is None or "cannot be written: No space left on device" in message
    assert step_of(run, "latest") in ((2, 3) if message else (3,))
    assert step_of(run, "previous") in (1, 2)
    save(run, "latest", 4, forms[1])
    assert steps(run)["latest"] == 4
    assert not [entry for entry in entries(run) if entry.startswith(".")]


def test_a_file_beside_a_folder_of_the_same_name_counts(run: Run, manager: CheckpointManager) -> None:
    """A Lumiere that does not know of folders went on with the run."""
    save(run, "latest", 1, "folder")
    shutil.move(run.checkpoints_dir / "latest", run.checkpoints_dir / "aside")
    save(run, "latest", 2, "file")
    shutil.move(run.checkpoints_dir / "aside", run.checkpoints_dir / "latest")
    assert manager.names(run) == ["latest"]
    assert step_of(run, "latest") == 2
    save(run, "latest", 3, "file")
    assert entries(run) == {"latest.safetensors", "previous.safetensors"}
    assert steps(run) == {"latest": 3, "previous": 2}


def test_names_and_steps_of_folders(run: Run, manager: CheckpointManager) -> None:
    for name, form in [
        ("step-00000512", "folder"),
        ("step-00000064", "file"),
        ("best", "folder"),
        ("latest", "folder"),
    ]:
        save(run, name, 5, form)
    for odd in ("step-5", "mine", ".best", ".best.old.1", "models"):
        (run.checkpoints_dir / odd).mkdir()
    (run.checkpoints_dir / "previous").write_bytes(b"a file, and no checkpoint without its suffix")
    assert manager.names(run) == ["best", "latest", "step-00000064", "step-00000512"]
    assert step_of(run, "512") == 5
    assert CheckpointManager().resolve(run, "best") == "best"
    manager.remove(run, "best")
    assert manager.names(run) == ["latest", "step-00000064", "step-00000512"]
    assert CheckpointManager().resolve(run, "best") == "latest"
    with pytest.raises(CheckpointError, match=r"has no checkpoint 'best' \(it has latest, step-00000064"):
        manager.load(run, "best")


def test_a_name_that_is_none_saves_nothing(run: Run, manager: CheckpointManager) -> None:
    for name in ("previous", "../best", "step-5", "mine"):
        with pytest.raises(ValueError, match="is no name for a checkpoint"):
            manager.save_shards(run, name, checkpoint(1), SINGLE_PROCESS)
    assert entries(run) == set()


@pytest.mark.parametrize("form", FORMS)
def test_a_removal_never_leaves_a_part(
    run: Run, manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    save(run, "best", 1, "folder")

    def killed(path: Path) -> None:
        (path / "checkpoint.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(placing, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            manager.remove(run, "best")
    assert manager.names(run) == []
    assert len(entries(run)) == 1
    save(run, "latest", 2, form)
    assert entries(run) == {"latest" if form == "folder" else "latest.safetensors"}


def test_clearing_touches_nothing_that_is_not_ours(run: Run, tmp_path: Path) -> None:
    kept = {".odd.tmp", ".mine.0a1b2c3d.tmp", ".other.old", ".best.old.folder"}
    for name in kept:
        (run.checkpoints_dir / name).mkdir()
    for name in (".latest.0a1b2c3d.tmp", ".step-00000512.0a1b2c3d.tmp"):
        (run.checkpoints_dir / name / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", run.checkpoints_dir / ".best.0a1b2c3d.tmp")
    placing.clear(run.checkpoints_dir)
    assert entries(run) == kept
    assert (tmp_path / "elsewhere").is_dir()


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(
    run: Run, manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lumiere.persistence import shard_reader

    save(run, "latest", 1, "folder")
    real, replaced = shard_reader.open_file, []

    def replacing(path: Path) -> Any:
        if not replaced:
            replaced.append(path)
            save(run, "latest", 2, "folder")
        return real(path)

    monkeypatch.setattr(shard_reader, "open_file", replacing)
    assert step_of(run, "latest") == 2
    assert len(replaced) == 1
