"""A disk that is full, cannot be written to, or is gone: an error with a hint, and nothing good is lost."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lumiere.config.loader import dump_config
from lumiere.errors import CheckpointError, LumiereError
from lumiere.files import Disk
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import run as run_module
from lumiere.training.events import Callback, Event, StepEvent
from lumiere.training.run import resume, start
from lumiere.training.setup import TrainingSetup, set_up, set_up_resume
from tests.persistence.disks import FailingDisk

SUPERVISE = run_module.run_training
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


def at_step(step: int, act: Callable[[Run], object], folder: Path) -> Callback:
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
    with pytest.raises(CheckpointError, match=r"step-00000005' cannot be written: it takes 0.1 MB, more") as caught:
        start(set_up(configure(LONGER)), RunStore(runs), callbacks=[at_step(4, lambda run: fill(runs, 30_000), runs)])
    assert "untouched" in (caught.value.hint or "")
    (run,) = RunStore(runs).all()
    assert run.status == "failed"
    assert CheckpointManager(runs).load_latest(run)[0].metadata["step"] == 3
    assert not list(run.path.rglob(".*.tmp"))
    (runs / "filler").unlink()
    assert resume(set_up_resume(run), run).state.step == 9
    assert tensor_hashes(run, "latest") == tensor_hashes(whole, "latest")


def test_a_disk_without_room_for_a_byte(configure, launch, small_disk: Path, tensor_hashes) -> None:
    whole = launch(configure(LONGER)).run
    runs = small_disk / "runs"
    # Nothing is left, not even for the record that the run failed.
    with pytest.raises(LumiereError, match="cannot be written"):
        start(set_up(configure(LONGER)), RunStore(runs), callbacks=[at_step(4, lambda run: fill(runs, 0), runs)])
    (run,) = RunStore(runs).all()
    assert run.status == "crashed"
    (runs / "filler").unlink()
    assert resume(set_up_resume(run), run).state.step == 9
    assert tensor_hashes(run, "latest") == tensor_hashes(whole, "latest")
    steps = [line.split(b",")[0] for line in run.metrics_path.read_bytes().splitlines() if b'"loss"' in line]
    assert steps == [b'{"step": %d' % step for step in range(1, 10)]


def test_a_disk_that_is_full_from_the_start_gets_no_run(configure, small_disk: Path) -> None:
    fill(small_disk, 20_000)
    with pytest.raises(CheckpointError, match="the checkpoints need"):
        start(set_up(configure(LONGER)), RunStore(small_disk / "runs"))
    assert not (small_disk / "runs").exists()


def test_a_disk_that_cannot_be_written_to(configure, stop_at, small_disk: Path) -> None:
    runs = small_disk / "runs"
    run = start(set_up(configure(LONGER)), RunStore(runs), callbacks=[stop_at(4)]).run
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LumiereError, match="cannot be locked: Read-only file system"):
        resume(set_up_resume(run), run)
    with pytest.raises(LumiereError, match=r"no run can be made in .*: Read-only file system"):
        start(set_up(configure(LONGER)), RunStore(runs))
    assert (run.status, run.load_model("latest").training) == ("interrupted", False)


def test_a_folder_that_is_removed_is_not_made_again(configure, launch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        launch(configure(LONGER), [at_step(5, lambda run: shutil.rmtree(run.path), tmp_path / "runs")])
    assert RunStore().all() == []


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting and resuming do all but train."""
    monkeypatch.setattr(run_module, "run_training", lambda *arguments, **keywords: None)


def attempts(act: Callable[[Disk], object], code: int = errno.ENOSPC) -> Iterator[int]:
    """Do it again and again, each time with another operation that fails, and yield its number.

    The error must be the user's to fix.
    """
    for number in itertools.count(1):
        disk = FailingDisk(number, code)
        error = None
        try:
            act(disk)
        except LumiereError as caught:
            error = caught
        if disk.count < number:
            return
        assert error, "no failure is ignored"
        assert error.hint
        yield number


def check_nothing_is_left(store: RunStore) -> None:
    assert store.all() == []
    # The two files of a runs directory come together, so that the next start does not take one of them for the user's.
    left = {path.name for path in store.runs_dir.iterdir()} if store.runs_dir.exists() else set()
    assert left in (set(), {"README.md", ".gitignore"})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.usefixtures("no_training")
def test_a_run_that_cannot_be_started_leaves_nothing(configure, tmp_path: Path, code: int) -> None:
    setup: TrainingSetup = set_up(configure(LONGER))
    stores: list[RunStore] = []

    def act(disk: Disk) -> None:
        stores.append(RunStore(tmp_path / str(len(stores)), disk))
        start(setup, stores[-1])

    for _ in attempts(act, code):
        check_nothing_is_left(stores[-1])
    # Six files, each created, written, synced, renamed and its folder synced; three folders.
    assert len(stores) == 1 + 6 * 5 + 3


@pytest.mark.usefixtures("no_training")
def test_a_run_whose_config_cannot_be_changed_stays_whole(configure, launch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "run_training", SUPERVISE)
        run = launch(configure({"training.max_steps": 2, "training.schedule": "constant"})).run
    longer = set_up_resume(run, settings={"training.max_steps": 3})
    before = run.config_path.read_bytes()
    for number in attempts(lambda disk: resume(longer, Run(run.path, disk))):
        # Metrics, record and config are written in this order, and the record again, each in five operations.
        assert run.load_config().training.max_steps == (2 if number < 15 else 3)
        assert CheckpointManager().load_latest(run)[0].step == 2
        assert not list(run.path.rglob(".*.tmp"))
        assert run.record.values["name"] == run.name
        run.config_path.write_bytes(before)


@pytest.mark.slow
def test_a_training_in_which_any_write_fails_goes_on_to_the_same_bits(
    configure, launch, tensor_hashes, tmp_path: Path
) -> None:
    config = configure({"training.max_steps": 3, "training.checkpoint_interval": 2, "training.snapshots": True})
    whole = tensor_hashes(launch(config).run, "latest")
    stores: list[RunStore] = []

    def act(disk: Disk) -> None:
        stores.append(RunStore(tmp_path / str(len(stores)), disk))
        start(set_up(config), stores[-1])

    for _ in attempts(act):
        for run in stores[-1].all():
            assert run.status in ("failed", "crashed", "finished")
            assert resume(set_up_resume(run), run).state.step == 3
            assert tensor_hashes(run, "latest") == whole
    assert len(stores) > 80


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
    assert error.endswith("cannot be written: File too large")
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
