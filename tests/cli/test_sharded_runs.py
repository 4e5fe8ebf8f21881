"""A run whose checkpoints were written as shards is used like any other, and gives the same numbers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.distributed import SINGLE_PROCESS
from lumiere.persistence.catalog import disk_bytes
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore
from tests.checkpoints import folder_of


def answer(*arguments: str) -> str:
    """The stdout of a command that must succeed."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def run(trained_run: Run) -> Run:
    """A copy of the trained run whose checkpoints are all shards."""
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    run, source, manager = RunStore().open("latest"), CheckpointManager(trained_run.path.parent), CheckpointManager()
    shutil.rmtree(run.checkpoints_dir)
    run.checkpoints_dir.mkdir()
    for names, name in ((["latest"], "previous"), (["best", "latest"], "latest"), *[([s], s) for s in SNAPSHOTS]):
        manager.save(run, names, source.load(trained_run, name), SINGLE_PROCESS)
    return run


SNAPSHOTS = ["step-00000000", "step-00000001", "step-00000002", "step-00000004", "step-00000008"]


@pytest.mark.parametrize(
    "command",
    [
        "eval latest --json",
        "eval latest --checkpoint 8 --json",
        "generate --prompt The -n 5 --seed 1",
        "inspect summary --json",
        "inspect attention --prompt The --checkpoint previous --json",
        "inspect dynamics --json",
    ],
)
def test_commands_give_what_they_give_of_files(run: Run, trained_run: Run, command: str) -> None:
    def of(runs_dir: Path) -> object:
        text = answer(*command.split(), "--runs-dir", str(runs_dir))
        if not command.endswith("--json"):
            return text
        values = json.loads(text)
        return {key: value for key, value in values.items() if "seconds" not in key and "per_second" not in key}

    assert of(run.path.parent) == of(trained_run.path.parent)


def test_the_run_is_shown_pruned_and_removed(run: Run, trained_run: Run) -> None:
    assert CheckpointManager().names(run) == CheckpointManager(trained_run.path.parent).names(trained_run)
    shown = json.loads(answer("runs", "show", "latest", "--json"))
    for checkpoint in shown["checkpoints"]:
        assert checkpoint["num_bytes"] == disk_bytes(folder_of(run, checkpoint["name"]))
        assert checkpoint["problem"] is None
    before, best = disk_bytes(run.path), folder_of(run, "best")
    freed = json.loads(answer("runs", "prune", "--keep", "best", "--yes", "--json"))["num_bytes"]
    assert before - disk_bytes(run.path) == pytest.approx(freed, abs=100)
    assert [path.parent for path in run.checkpoints_dir.glob("**/checkpoint.json")] == [best]
    answer("runs", "rm", run.id, "--yes")
    assert not run.path.exists()


def test_a_training_goes_on_from_shards(run: Run, trained_run: Run) -> None:
    """From step 8, in one process, which writes files: the bits of the training that never stopped."""
    manager, source = CheckpointManager(), CheckpointManager(trained_run.path.parent)
    expected, earlier = source.load(trained_run, "latest"), source.load(trained_run, "previous")
    assert earlier.step == 8
    manager.save(run, "latest", replace(earlier, metadata=earlier.metadata | {"seconds": 1.0}), SINGLE_PROCESS)
    run.update(status="interrupted", stop_reason=None)
    answer("train", "--resume", "latest")
    latest = manager.load(run, "latest")
    assert latest.step == expected.step == 12
    for name, tensor in expected.tensors().items():
        assert tensor.equal(latest.tensors()[name])
    assert (folder_of(run, "latest") / "model.safetensors").is_file()


def test_a_damaged_folder_is_refused_in_two_lines(run: Run) -> None:
    (folder_of(run, "best") / "checkpoint.json").write_text("\x1b[31m")
    result = CliRunner().invoke(app, ["eval", "latest"])
    assert (result.exit_code, result.stdout) == (2, "")
    error, hint = result.stderr.splitlines()
    assert "checkpoint.json" in error
    assert hint.startswith("hint: use another checkpoint of the run")
    assert "checkpoint.json" in answer("runs", "show", "latest")
