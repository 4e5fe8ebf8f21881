"""Deleting leaves whole runs, whenever it is interrupted, and never leaves the runs directory."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lumiere import files as lock
from lumiere.errors import LumiereError, RunBusyError
from lumiere.files import locked
from lumiere.persistence.catalog import (
    check_removable,
    checkpoint_files,
    disk_bytes,
    parse_keep,
    plan_pruning,
    prune,
    remove_leftovers,
    remove_run,
)
from lumiere.persistence.runs import Run, RunStore
from tests.checkpoints import folder_of
from tests.persistence.disks import WatchedDisk
from tests.persistence.shards import make_folder

CHECKPOINTS = {"best": 100, "latest": 200, "previous": 300, "step-00000000": 1, "step-00000512": 2}


def make(store: RunStore, status: str = "finished") -> Run:
    run = store.create()
    run.update(status=status)
    pointers = {"best": "step-00000001", "latest": "step-00000003", "previous": "step-00000002"}
    (run.checkpoints_dir / "pointers.json").write_text(json.dumps(pointers))
    for name, size in CHECKPOINTS.items():
        folder = run.checkpoints_dir / pointers.get(name, f"snapshots/{name}")
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(size))
    return run


def names(run: Run) -> list[str]:
    return [checkpoint.name for checkpoint in checkpoint_files(run)]


def test_a_removed_run_is_gone_and_the_others_are_not(store: RunStore) -> None:
    gone, kept = make(store), make(store)
    remove_run(gone)
    assert store.all() == [kept]
    assert sorted(path.name for path in store.runs_dir.iterdir()) == [".gitignore", "README.md", kept.name]


def test_a_kill_while_deleting_leaves_no_half_run(store: RunStore) -> None:
    run, kept = make(store), make(store)

    def kill(operation: str) -> None:
        if operation == "half":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remove_run(Run(run.path, WatchedDisk(kill)))
    assert store.all() == [kept]
    (leftover,) = store.runs_dir.glob(".removed.*")
    remove_leftovers(store)
    assert not leftover.exists()
    assert store.all() == [kept]


@pytest.mark.parametrize("name", [".removed.mine", "removed", ".removed.run_aaaaaaaa_20250101_000000", ".removed.."])
def test_only_leftovers_of_ours_are_cleaned_up(store: RunStore, name: str) -> None:
    make(store)
    (store.runs_dir / name).mkdir()
    remove_leftovers(store)
    assert (store.runs_dir / name).is_dir()


def test_leftovers_of_no_runs_directory(store: RunStore) -> None:
    remove_leftovers(store)
    assert not store.runs_dir.exists()


def test_a_run_that_is_trained_is_refused(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its training begins between the look at its status and the deletion."""
    monkeypatch.setattr(lock, "PATIENCE", 0.01)
    run = make(store)
    plan = plan_pruning(run, ["best"])
    removals = [lambda: remove_run(run), lambda: prune(plan)]
    with locked(run.path):
        for remove in removals:
            with pytest.raises(RunBusyError):
                remove()
        run.update(status="running")
        for remove in (*removals, lambda: check_removable(run)):
            with pytest.raises(RunBusyError, match=f"run {run.id} is running"):
                remove()
    assert names(run) == list(CHECKPOINTS)
    # Its process has died: there is nothing to stop any more.
    check_removable(run)


def test_links_are_taken_away_and_not_followed(store: RunStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    inside = make(store)
    shutil.copytree(inside.path, outside)
    linked = Run(store.runs_dir / "run_aaaaaaaa_20250101_000000")
    os.symlink(outside, linked.path)
    os.symlink(outside, inside.path / "link")
    assert linked in store.all()
    assert disk_bytes(linked.path) == 0
    assert plan_pruning(linked, ["best"]).reason == "its checkpoints are behind a link"
    remove_run(linked)
    remove_run(inside)
    assert store.all() == []
    assert len(list((outside / "checkpoints").glob("**/model.safetensors"))) == len(CHECKPOINTS)


def test_checkpoints_behind_a_link_are_not_pruned(store: RunStore, tmp_path: Path) -> None:
    run = make(store)
    shutil.move(run.checkpoints_dir, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", run.checkpoints_dir)
    plan = plan_pruning(run, ["best"])
    assert (plan.names, plan.reason) == ((), "its checkpoints are behind a link")


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ("best", ["best"]),
        ("best,latest", ["best", "latest"]),
        (" latest , 512", ["latest", "step-00000512"]),
        ("best,step-00000000", ["best", "step-00000000"]),
        ("previous,snapshots", ["previous", "step-00000000", "step-00000512"]),
        ("best,latest,previous,snapshots", list(CHECKPOINTS)),
    ],
)
def test_pruning_keeps_what_is_named_and_counts_the_bytes(store: RunStore, keep: str, left: list[str]) -> None:
    run = make(store)
    before = disk_bytes(run.path)
    plan = plan_pruning(run, parse_keep(keep))
    assert names(run) == list(CHECKPOINTS), "planning deletes nothing"
    prune(plan)
    assert names(run) == left
    assert plan.num_bytes == sum(size for name, size in CHECKPOINTS.items() if name not in left)
    # The pointers take some bytes more or less.
    assert before - disk_bytes(run.path) == pytest.approx(plan.num_bytes, abs=100)


@pytest.mark.parametrize("keep", ["best", "latest,previous"])
def test_checkpoints_of_format_1_are_pruned_and_counted(store: RunStore, tmp_path: Path, keep: str) -> None:
    run = store.create()
    run.update(status="finished")
    for name in ("latest", "step-00000512"):
        (run.checkpoints_dir / f"{name}.safetensors").write_bytes(bytes(200))
    in_folder = sum(path.stat().st_size for path in make_folder(run.checkpoints_dir / "previous", number="1").iterdir())
    os.symlink(make_folder(tmp_path / "elsewhere", number="1"), run.checkpoints_dir / "best")
    sizes = {checkpoint.name: checkpoint.num_bytes for checkpoint in checkpoint_files(run)}
    assert sizes == {"best": 0, "latest": 200, "previous": in_folder, "step-00000512": 200}
    before = disk_bytes(run.path)
    plan = plan_pruning(run, parse_keep(keep))
    prune(plan)
    assert names(run) == keep.split(",")
    assert plan.num_bytes == before - disk_bytes(run.path)
    assert (tmp_path / "elsewhere" / "checkpoint.json").is_file()


def test_a_checkpoint_is_described_by_its_manifest(store: RunStore) -> None:
    run = make(store)
    folder = folder_of(run, "latest")
    assert checkpoint_files(run)[1].problem is not None
    shutil.rmtree(folder)
    make_folder(folder)
    latest = checkpoint_files(run)[1]
    assert (latest.name, latest.step, latest.problem) == ("latest", 512, None)
    (folder / "shard-2.safetensors").unlink()
    damaged = checkpoint_files(run)[1]
    assert damaged.step is None
    assert damaged.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert "shard-2.safetensors" in (damaged.problem or "")


def test_a_folder_with_two_names_is_freed_with_the_second(store: RunStore) -> None:
    run = make(store)
    pointers = {"best": "step-00000001", "latest": "step-00000003", "previous": "step-00000001"}
    (run.checkpoints_dir / "pointers.json").write_text(json.dumps(pointers))
    plan = plan_pruning(run, ["best", "latest", "snapshots"])
    assert (plan.names, plan.num_bytes) == (("previous",), 0)
    prune(plan)
    assert names(run) == [name for name in CHECKPOINTS if name != "previous"]


@pytest.mark.parametrize("status", ["interrupted", "failed", "crashed", "unknown", "\x1b"])
def test_only_finished_runs_are_pruned(store: RunStore, status: str) -> None:
    plan = plan_pruning(make(store, status), ["best"])
    assert (plan.names, plan.num_bytes) == ((), 0)
    assert plan.reason == f"it is {status}, not finished"


def test_a_run_is_never_left_without_any_checkpoint(store: RunStore) -> None:
    run = make(store)
    assert plan_pruning(run, parse_keep("7")).reason == "it has none of those to keep"
    assert plan_pruning(run, parse_keep("7,best")).reason is None


@pytest.mark.parametrize("keep", ["", "bset", "best,", "../best", "-1", "step-5", "best latest", "\x1b"])
def test_names_that_are_none_are_refused(keep: str) -> None:
    with pytest.raises(LumiereError, match="there is no checkpoint"):
        parse_keep(keep)
