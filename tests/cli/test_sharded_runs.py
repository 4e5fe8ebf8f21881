"""A run whose checkpoints were written as shards is used like any other, and gives the same numbers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lumiere.distributed import SINGLE_PROCESS
from lumiere.persistence.catalog import disk_bytes
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore
from tests.checkpoints import folder_of
from tests.cli.commands import invoke, read_json, stdout_of

SNAPSHOTS = ["step-00000000", "step-00000001", "step-00000002", "step-00000004", "step-00000008"]


@pytest.fixture(scope="module")
def sharded_run(trained_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the trained run whose checkpoints are all shards. Read-only."""
    store = RunStore(tmp_path_factory.mktemp("sharded"))
    shutil.copytree(trained_run.path, store.runs_dir / trained_run.name)
    run, source, manager = (
        store.open("latest"),
        CheckpointManager(trained_run.path.parent),
        CheckpointManager(store.runs_dir),
    )
    shutil.rmtree(run.checkpoints_dir)
    run.checkpoints_dir.mkdir()
    for names, name in ((["latest"], "previous"), (["best", "latest"], "latest"), *[([s], s) for s in SNAPSHOTS]):
        manager.save(run, names, source.load(trained_run, name), SINGLE_PROCESS)
    return run


@pytest.fixture
def run(sharded_run: Run) -> Run:
    """A copy of the sharded run, alone in the runs directory, to be changed."""
    shutil.copytree(sharded_run.path, Path("runs") / sharded_run.name)
    return RunStore().open("latest")


@pytest.mark.parametrize(
    "command",
    [
        "eval latest --json",
        "eval latest --checkpoint 8 --json",
        "generate --prompt The -n 5 --seed 1 --json",
        "inspect summary --json",
        "inspect attention --prompt The --checkpoint previous --json",
        "inspect dynamics --json",
    ],
)
def test_commands_give_what_they_give_of_files(sharded_run: Run, trained_run: Run, command: str) -> None:
    shown = []
    for run in (sharded_run, trained_run):
        values = json.loads(stdout_of(*command.split(), "--runs-dir", str(run.path.parent)))
        values = values[0] if isinstance(values, list) else values
        shown.append({key: value for key, value in values.items() if "seconds" not in key and "per_second" not in key})
    assert shown[0] == shown[1]


def test_the_run_is_shown_pruned_and_removed(run: Run, trained_run: Run) -> None:
    assert CheckpointManager().names(run) == CheckpointManager(trained_run.path.parent).names(trained_run)
    for checkpoint in read_json("runs", "show", "latest")["checkpoints"]:
        assert checkpoint["num_bytes"] == disk_bytes(folder_of(run, checkpoint["name"]))
        assert checkpoint["problem"] is None
    before, best = disk_bytes(run.path), folder_of(run, "best")
    freed = read_json("runs", "prune", "--keep", "best", "--yes")["num_bytes"]
    assert before - disk_bytes(run.path) == pytest.approx(freed, abs=100)
    assert [path.parent for path in run.checkpoints_dir.glob("**/checkpoint.json")] == [best]
    invoke("runs", "rm", run.id, "--yes")
    assert not run.path.exists()


def test_a_training_goes_on_from_shards(run: Run, trained_run: Run) -> None:
    """From step 8, in one process, which writes files: the bits of the training that never stopped."""
    manager, source = CheckpointManager(), CheckpointManager(trained_run.path.parent)
    expected, earlier = source.load(trained_run, "latest"), source.load(trained_run, "previous")
    assert earlier.step == 8
    manager.save(run, "latest", replace(earlier, metadata=earlier.metadata | {"seconds": 1.0}), SINGLE_PROCESS)
    run.update(status="interrupted", stop_reason=None)
    invoke("train", "--resume", "latest")
    latest = manager.load(run, "latest")
    assert latest.step == expected.step == 12
    for name, tensor in expected.tensors().items():
        assert tensor.equal(latest.tensors()[name])
    assert (folder_of(run, "latest") / "model.safetensors").is_file()
