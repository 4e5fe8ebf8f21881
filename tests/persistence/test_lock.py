"""The lock of a run: one holder at a time, gone with its process, and never in the way of a look."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lumiere import files as lock_module
from lumiere.errors import LumiereError, RunBusyError
from lumiere.files import is_locked, locked
from lumiere.persistence.runs import RunStore

HOLD = """
import sys, time
from pathlib import Path
from lumiere.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process of its own that holds the lock of `tmp_path`."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_it_dies_with_its_owner(holder: subprocess.Popen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "PATIENCE", 0.01)
    assert is_locked(tmp_path)
    with pytest.raises(RunBusyError, match="is being trained by another process"), locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_a_look_leaves_nothing_behind(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert not is_locked(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_it_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert not is_locked(tmp_path)


def test_a_folder_that_is_gone_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(LumiereError, match="cannot be locked") as caught, locked(tmp_path / "gone"):
        pass
    assert not isinstance(caught.value, RunBusyError)
    assert not (tmp_path / "gone").exists()


def test_running_is_only_who_holds_the_lock() -> None:
    run = RunStore().create()
    assert run.status == "unknown"
    run.update(status="running")
    assert run.status == "crashed"
    with locked(run.path):
        assert run.status == "running"
        run.update(status="finished")
        assert run.status == "finished"
    assert run.status == "finished"


def test_fifty_processes_make_fifty_runs(tmp_path: Path) -> None:
    """At once: they wait for the same file, and the children of a fork start with the same random numbers' state."""
    program = """
import os, sys, time
from pathlib import Path
from lumiere.persistence.runs import RunStore
children = []
for _ in range(50):
    child = os.fork()
    if child == 0:
        while not Path("go").exists():
            time.sleep(0.001)
        RunStore().create()
        os._exit(0)
    children.append(child)
Path("go").touch()
sys.exit(sum(os.waitpid(child, 0)[1] for child in children))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    runs = RunStore(tmp_path / "runs").all()
    assert len(runs) == len({run.id for run in runs}) == 50
    assert all(run.checkpoints_dir.is_dir() for run in runs)
    assert not list((tmp_path / "runs").glob(".*.tmp"))
