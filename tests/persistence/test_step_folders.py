"""A save replaces nothing in place: a kill or a failure at any instant leaves every checkpoint whole."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lumiere.distributed import SINGLE_PROCESS
from lumiere.errors import CheckpointError
from lumiere.files import DISK, Disk
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run
from lumiere.persistence.step_folders import clear, read_pointers
from tests.checkpoints import checkpoint, copy_fixture
from tests.persistence.disks import FailingDisk, StrictDisk, WatchedDisk
from tests.persistence.shards import flip


def save(run: Run, names: str | list[str], step: int, disk: Disk = DISK, shards: bool = False) -> None:
    CheckpointManager().save(Run(run.path, disk), names, checkpoint(step), SINGLE_PROCESS if shards else None)


def steps(run: Run) -> dict[str, int]:
    """Return the step of each checkpoint that can be loaded."""
    manager, found = CheckpointManager(run.path.parent), {}
    for name in manager.names(run):
        try:
            loaded = manager.load(run, name)
        except CheckpointError:
            continue
        assert loaded.model["weight"].tolist() == [loaded.step] * 3
        found[name] = loaded.step
    return found


def entries(run: Run) -> set[str]:
    return {str(path.relative_to(run.checkpoints_dir)) for path in run.checkpoints_dir.glob("**/step-*")} | {
        path.name for path in run.checkpoints_dir.iterdir() if path.name != "snapshots"
    }


def damage(run: Run, name: str) -> None:
    flip("model.safetensors")(run.checkpoints_dir / read_pointers(run.checkpoints_dir)[name])


def states_of_a_save(run: Run, names: str | list[str], step: int, shards: bool, folder: Path) -> list[Run]:
    """Save, and return copies of the run as it was before and inside every file operation."""
    states: list[Run] = []

    def look(operation: str) -> None:
        if operation != "fsync":  # a copy shows nothing of it
            states.append(Run(folder / f"{len(states)}-{operation}" / run.name))
            shutil.copytree(run.path, states[-1].path)

    save(run, names, step, WatchedDisk(look), shards)
    return states


@pytest.mark.parametrize(
    ("shards", "damaged"),
    [
        pytest.param(False, None, marks=pytest.mark.slow),
        (True, None),
        pytest.param(False, "latest", marks=pytest.mark.slow),
        pytest.param(False, "previous", marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_instant_of_a_save_loses_no_checkpoint(
    run: Run, tmp_path: Path, shards: bool, damaged: str | None
) -> None:
    save(run, ["best", "latest"], 1)
    save(run, "latest", 2)
    before = {"best": 1, "latest": 2, "previous": 1}
    if damaged:
        damage(run, damaged)
        before = steps(run)
    newest = before.get("latest", 1)
    states = states_of_a_save(run, ["best", "latest"], 3, shards, tmp_path / "states")
    after = steps(run)
    assert after == {"best": 3, "latest": 3} | ({} if damaged == "latest" else {"previous": 2})
    assert len(states) > 15
    seen = []
    for killed in states:
        assert steps(killed) in (before, after)
        seen.append(CheckpointManager(killed.path.parent).load_latest(killed)[0].step)
        # What the kill left is removed, and nothing else is.
        found = steps(killed)
        clear(killed.checkpoints_dir)
        assert steps(killed) == found
        assert not [name for name in entries(killed) if ".tmp" in name]
        # The next save leaves the run as if nothing had happened.
        save(killed, "latest", 4)
        expected = {name: step for name, step in found.items() if name == "best"} | {"latest": 4}
        assert steps(killed) == expected | ({"previous": found["latest"]} if "latest" in found else {})
        assert len(entries(killed)) <= 4
    assert seen == sorted(seen)
    # The last operations remove what is superseded.
    assert (seen[0], seen[-1]) == (newest, 3)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["files", "shards"])
def test_a_save_that_fails_anywhere_leaves_the_checkpoints_and_the_next_one_works(run: Run, shards: bool) -> None:
    save(run, ["best", "latest"], 1)
    save(run, "latest", 2)
    counting = FailingDisk(0)
    shutil.copytree(run.path, run.path.with_name("aside"))
    save(run, "latest", 3, counting, shards)
    assert counting.count > 15
    errors: list[str] = []
    for number in range(1, counting.count + 1):
        shutil.rmtree(run.path)
        shutil.copytree(run.path.with_name("aside"), run.path)
        try:
            save(run, "latest", 3, FailingDisk(number), shards)
        except CheckpointError as error:
            errors.append(error.message)
        assert steps(run) in ({"best": 1, "latest": 2, "previous": 1}, {"best": 1, "latest": 3, "previous": 2})
        previous = steps(run)["latest"]
        save(run, "latest", 4, shards=shards)
        assert steps(run) == {"best": 1, "latest": 4, "previous": previous}
        assert len(entries(run)) == 4
    assert len(errors) == counting.count
    assert all(os.strerror(28) in error for error in errors)


@pytest.mark.parametrize("shards", [False, True], ids=["files", "shards"])
def test_contents_are_durable_before_a_rename_and_the_name_after(run: Run, shards: bool) -> None:
    disk = StrictDisk()
    # The first save removes nothing, so that no inode is used twice.
    save(run, ["best", "latest"], 1, disk, shards)
    assert disk.renamed == ["checkpoint.json", "step-00000001", "pointers.json"]


def test_what_no_pointer_names_goes(run: Run) -> None:
    save(run, ["best", "latest"], 1)
    for step in (2, 3, 4):
        save(run, "latest", step)
        assert steps(run) == {"best": 1, "latest": step, "previous": step - 1}
    assert entries(run) == {"pointers.json", "step-00000001", "step-00000003", "step-00000004"}
    save(run, "best", 4)
    # One step with the same contents is one folder, whatever it is called.
    assert entries(run) == {"pointers.json", "step-00000003", "step-00000004"}


def test_a_folder_is_never_changed_or_replaced(run: Run) -> None:
    manager = CheckpointManager(run.path.parent)
    save(run, ["best", "latest"], 5)
    contents = {path: path.read_bytes() for path in (run.checkpoints_dir / "step-00000005").iterdir()}
    for number in (2, 3):
        manager.save(run, "latest", checkpoint(5, value=number))
        assert manager.load(run, "latest").model["weight"].tolist() == [number] * 3
    assert {path: path.read_bytes() for path in contents} == contents
    assert entries(run) == {"pointers.json", "step-00000005", "step-00000005-2", "step-00000005-3"}


def test_a_snapshot_of_the_same_step_supersedes_the_one_before(run: Run) -> None:
    manager = CheckpointManager(run.path.parent)
    for value in (1, 2, 2):
        manager.save(run, "step-00000008", checkpoint(8, value=value))
    assert manager.load(run, "8").model["weight"].tolist() == [2] * 3
    assert manager.names(run) == ["step-00000008"]
    assert entries(run) == {"snapshots/step-00000008-2"}


@pytest.mark.parametrize(
    "pointers",
    [
        b"",
        b"[]",
        b'{"latest": "step-00000001"',
        b'{"latest": 1}',
        b'{"latest": "../step-00000001"}',
        b'{"latest": "step-1"}',
        b'{"latest": "snapshots"}',
        b'{"newest": "step-00000001"}',
        b'{"latest": "step-00000001", "latest": "step-00000001"}',
        b" " * 20_000 + b"{}",
    ],
)
def test_damaged_pointers_are_an_error_and_delete_nothing(run: Run, pointers: bytes) -> None:
    save(run, "latest", 1)
    (run.checkpoints_dir / "pointers.json").write_bytes(pointers)
    manager = CheckpointManager(run.path.parent)
    for use in (lambda: manager.load(run, "latest"), lambda: manager.names(run), lambda: save(run, "latest", 2)):
        with pytest.raises(CheckpointError, match=r"pointers\.json") as caught:
            use()
        assert caught.value.hint
    (run.checkpoints_dir / "pointers.json").write_text(json.dumps({"latest": "step-00000001"}))
    assert steps(run) == {"latest": 1}


def test_a_checkpoint_whose_folder_is_gone_is_named(run: Run) -> None:
    save(run, "latest", 1)
    save(run, "latest", 2)
    shutil.rmtree(run.checkpoints_dir / "step-00000002")
    manager = CheckpointManager(run.path.parent)
    with pytest.raises(CheckpointError, match="step-00000002"):
        manager.load(run, "latest")
    assert manager.load_latest(run)[1] == "previous"


def test_a_removal_never_leaves_a_part(run: Run, tmp_path: Path) -> None:
    save(run, ["best", "latest"], 1)
    save(run, ["latest", "best"], 2)
    save(run, "step-00000002", 2)
    states: list[tuple[str, Run]] = []

    def look(operation: str) -> None:
        states.append((operation, Run(tmp_path / "states" / str(len(states)) / run.name)))
        shutil.copytree(run.path, states[-1][1].path)

    CheckpointManager().remove(Run(run.path, WatchedDisk(look)), "best", "previous", "2")
    assert steps(run) == {"latest": 2}
    assert entries(run) == {"pointers.json", "step-00000002"}
    for _, killed in states:
        # Whatever has a name can be loaded.
        assert steps(killed).keys() == set(CheckpointManager(killed.path.parent).names(killed))
        clear(killed.checkpoints_dir)
        assert not [name for name in entries(killed) if ".tmp" in name]


def test_clearing_touches_nothing_that_is_not_ours(run: Run, tmp_path: Path) -> None:
    save(run, "latest", 1)
    kept = {".odd.tmp", ".mine.0a1b2c3d.tmp", ".other.old", "step-5", "mine"}
    for name in kept:
        (run.checkpoints_dir / name).mkdir()
    for name in (".latest.0a1b2c3d.tmp", ".step-00000512.0a1b2c3d.tmp", "snapshots/.step-00000512.0a1b2c3d.tmp"):
        (run.checkpoints_dir / name / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", run.checkpoints_dir / ".best.0a1b2c3d.tmp")
    clear(run.checkpoints_dir)
    assert {path.name for path in run.checkpoints_dir.iterdir()} == {
        *kept, "pointers.json", "step-00000001", "snapshots"
    }  # fmt: skip
    assert (tmp_path / "elsewhere").is_dir()


def test_a_checkpoint_that_is_superseded_while_it_is_read_is_read_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lumiere.persistence import checkpoint as reader

    save(run, "latest", 1)
    real, saved = reader.read_manifest, []

    def supersede(folder: Path) -> object:
        manifest = real(folder)
        while len(saved) < 2:
            saved.append(folder)
            save(run, "latest", 1 + len(saved))
        return manifest

    monkeypatch.setattr(reader, "read_manifest", supersede)
    assert CheckpointManager(run.path.parent).load(run, "latest").step == 3


# Runs of format 1


@pytest.fixture(params=["run_v1", "run_v1_ema_muon", "run_v1_fsdp"])
def old_run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return copy_fixture(request.param, tmp_path / "old")


def loaded_steps(run: Run) -> dict[str, int]:
    manager = CheckpointManager(run.path.parent)
    return {name: manager.load(run, name).step for name in manager.names(run)}


@pytest.mark.slow
def test_saves_take_over_a_run_of_format_1_without_a_loss(old_run: Run, tmp_path: Path) -> None:
    before = loaded_steps(old_run)
    states = states_of_a_save(old_run, "latest", 99, False, tmp_path / "states")
    after = before | {"latest": 99, "previous": before["latest"]}
    assert loaded_steps(old_run) == after
    for killed in states:
        # The old latest gets its new name last.
        found = loaded_steps(killed)
        assert found == before or found | {"previous": before["latest"]} == after
        save(killed, "latest", 100)
        assert loaded_steps(killed)["latest"] == 100
    save(old_run, ["best", "latest"], 100)
    assert loaded_steps(old_run) == before | {"latest": 100, "previous": 99, "best": 100}
    # Nothing of format 1 is left but its snapshots.
    left = {name for name in entries(old_run) if not name.startswith("step-")}
    assert left == {"pointers.json"}


@pytest.mark.parametrize("form", [".safetensors", ""])
def test_a_checkpoint_that_an_old_kill_moved_aside_is_found(tmp_path: Path, form: str) -> None:
    run = copy_fixture("run_v1" if form else "run_v1_fsdp", tmp_path / "old")
    step = loaded_steps(run)["latest"]
    os.rename(run.checkpoints_dir / f"latest{form}", run.checkpoints_dir / f".latest.old{form}")
    assert loaded_steps(run)["latest"] == step
    save(run, "latest", 99)
    assert loaded_steps(run)["previous"] == step


def test_old_checkpoints_are_removed_by_name(old_run: Run) -> None:
    manager = CheckpointManager(old_run.path.parent)
    names = manager.names(old_run)
    for name in names:
        manager.remove(old_run, name)
        names = [other for other in names if other != name]
        assert manager.names(old_run) == names
    assert entries(old_run) == set()
