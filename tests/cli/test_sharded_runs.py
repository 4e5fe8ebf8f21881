"""A run whose checkpoints are folders of shards is used like any other, and gives the same numbers."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.distributed import SINGLE_PROCESS
from lumiere.persistence.catalog import disk_bytes
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore


def answer(*arguments: str) -> str:
    """The stdout of a command that must succeed."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def run(trained_run: Run) -> Run:
    """A copy of the trained run whose checkpoints are all folders."""
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    run = RunStore().open("latest")
    manager = CheckpointManager()
    # `previous` is given its name by a save of `latest`.
    for name in ("latest", "previous"):
        (run.checkpoints_dir / f"{name}.safetensors").unlink()
    source = CheckpointManager(trained_run.path.parent)
    for name in ("previous", "latest", "best", "step-00000000", "step-00000008"):
        manager.save_shards(
            run, "latest" if name == "previous" else name, source.load(trained_run, name), SINGLE_PROCESS
        )
    return run


FOLDERS = ["best", "latest", "previous", "step-00000000", "step-00000008"]


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
    sizes = {checkpoint["name"]: checkpoint["num_bytes"] for checkpoint in shown["checkpoints"]}
    for name in FOLDERS:
        assert sizes[name] == sum(path.stat().st_size for path in (run.checkpoints_dir / name).iterdir())
    assert [checkpoint["problem"] for checkpoint in shown["checkpoints"]] == [None] * len(sizes)
    before = disk_bytes(run.path)
    freed = json.loads(answer("runs", "prune", "--keep", "best", "--yes", "--json"))["num_bytes"]
    assert before - disk_bytes(run.path) == freed
    assert {path.name for path in run.checkpoints_dir.iterdir()} == {"best"}
    answer("runs", "rm", run.id, "--yes")
    assert not run.path.exists()


def test_a_training_goes_on_from_a_folder(run: Run, trained_run: Run) -> None:
    """From step 8, in one process, which writes files: the bits of the training that never stopped."""
    source = CheckpointManager(trained_run.path.parent)
    assert source.load(trained_run, "previous").step == 8
    shutil.rmtree(run.checkpoints_dir / "latest")
    shutil.move(run.checkpoints_dir / "previous", run.checkpoints_dir / "latest")
    run.update(status="interrupted", stop_reason=None)
    answer("train", "--resume", "latest")
    expected, latest = source.load(trained_run, "latest"), CheckpointManager().load(run, "latest")
    assert latest.step == expected.step == 12
    for name, tensor in expected.model.items():
        assert tensor.equal(latest.model[name])
    assert (run.checkpoints_dir / "latest.safetensors").is_file()
    assert not (run.checkpoints_dir / "latest").exists()
    assert not list(run.checkpoints_dir.glob(".*"))


def test_a_damaged_folder_is_refused_in_two_lines(run: Run) -> None:
    (run.checkpoints_dir / "best" / "checkpoint.json").write_text("\x1b[31m")
    result = CliRunner().invoke(app, ["eval", "latest"])
    assert (result.exit_code, result.stdout) == (2, "")
    error, hint = result.stderr.splitlines()
    assert error.endswith("best' is damaged: checkpoint.json is no JSON object")
    assert hint == "hint: use another checkpoint of the run: best, latest, previous, or a step's"
    assert "is damaged: checkpoint.json is no JSON object" in " ".join(answer("runs", "show", "latest").split())
