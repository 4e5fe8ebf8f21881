"""A disk that is full, cannot be written to, or is gone: an error with a hint, and nothing good is lost."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lumiere.config.loader import dump_config
from lumiere.errors import CheckpointError, LumiereError
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.events import Event, Listener, StepEvent
from lumiere.training.launch import resume, start
from lumiere.training.preparation import prepare, prepare_resume

LONGER = {"training.max_steps": 9, "training.checkpoint_interval": 3, "training.snapshots": False}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def at_step(step: int, act: Callable[[Run], object], folder: Path) -> Listener:
    """Does something to the only run of a folder during a step."""

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            act(RunStore(folder).all()[0])

    return listen


def fill(folder: Path, left: int) -> Path:
    """Fill the disk of `folder`, but for so many bytes."""
    filler = folder / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(folder).free - left))
    return filler


def test_a_disk_that_gets_full_between_two_saves(configure, launch, small_disk: Path, tensor_hashes) -> None:
    whole = launch(configure(LONGER)).run
    runs = small_disk / "runs"
    with pytest.raises(CheckpointError, match=r"best\.safetensors' cannot be written: it takes 0.1 MB, more") as caught:
        start(prepare(configure(LONGER)), RunStore(runs), listeners=[at_step(4, lambda run: fill(runs, 30_000), runs)])
    assert "the checkpoint that was there is untouched" in (caught.value.hint or "")
    (run,) = RunStore(runs).all()
    assert run.status == "failed"
    assert CheckpointManager(runs).load_latest(run)[0].metadata["step"] == 3
    assert not list(run.path.rglob(".*.tmp"))
    (runs / "filler").unlink()
    assert resume(prepare_resume(run), run).state.step == 9
    assert tensor_hashes(run, "latest") == tensor_hashes(whole, "latest")


def test_a_disk_without_room_for_a_byte(configure, launch, small_disk: Path, tensor_hashes) -> None:
    whole = launch(configure(LONGER)).run
    runs = small_disk / "runs"
    # Nothing is left, not even for the record that the run failed.
    with pytest.raises(LumiereError, match="cannot be written"):
        start(prepare(configure(LONGER)), RunStore(runs), listeners=[at_step(4, lambda run: fill(runs, 0), runs)])
    (run,) = RunStore(runs).all()
    assert run.status == "crashed"
    (runs / "filler").unlink()
    assert resume(prepare_resume(run), run).state.step == 9
    assert tensor_hashes(run, "latest") == tensor_hashes(whole, "latest")
    steps = [line.split(b",")[0] for line in run.metrics_path.read_bytes().splitlines() if b'"loss"' in line]
    assert steps == [b'{"step": %d' % step for step in range(1, 10)]


def test_a_disk_that_is_full_from_the_start_gets_no_run(configure, small_disk: Path) -> None:
    fill(small_disk, 20_000)
    with pytest.raises(CheckpointError, match="the checkpoints need"):
        start(prepare(configure(LONGER)), RunStore(small_disk / "runs"))
    assert not (small_disk / "runs").exists()


def test_a_disk_that_cannot_be_written_to(configure, stop_at, small_disk: Path) -> None:
    runs = small_disk / "runs"
    run = start(prepare(configure(LONGER)), RunStore(runs), listeners=[stop_at(4)]).run
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LumiereError, match="cannot be locked: Read-only file system"):
        resume(prepare_resume(run), run)
    with pytest.raises(LumiereError, match=r"no run can be made in .*: Read-only file system"):
        start(prepare(configure(LONGER)), RunStore(runs))
    assert (run.status, run.load_model("latest").training) == ("interrupted", False)


def test_a_folder_that_is_removed_is_not_made_again(configure, launch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        launch(configure(LONGER), [at_step(5, lambda run: shutil.rmtree(run.path), tmp_path / "runs")])
    assert RunStore().all() == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of resources")
def test_a_limit_on_the_size_of_files(configure, launch, tensor_hashes, tmp_path: Path) -> None:
    """What needs no permission to mount: the system ends a write in the middle of a file."""
    whole = launch(configure(LONGER)).run
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(configure(LONGER)))
    command = [sys.executable, "-m", "lumiere", "train", str(config), "--runs-dir", "limited"]
    limited = f"ulimit -f 40; exec {' '.join(command)}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2, result.stderr
    error, hint = result.stderr.splitlines()[-2:]
    assert error.endswith("latest.safetensors' cannot be written: File too large")
    assert hint.startswith("hint: make room")
    (run,) = RunStore("limited").all()
    assert run.status == "failed"
    assert CheckpointManager("limited").names(run) == []
    assert not list(run.path.rglob(".*.tmp"))
    again = subprocess.run(
        [*command[:4], "--resume", run.id, "--runs-dir", "limited"], capture_output=True, env=environment, check=False
    )
    assert again.returncode == 0, again.stderr
    assert tensor_hashes(run, "latest") == tensor_hashes(whole, "latest")
