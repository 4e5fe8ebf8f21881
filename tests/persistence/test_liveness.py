"""A run is seen as running from every machine that shares its folder, and as crashed as soon as that is certain."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lumiere.errors import RunBusyError
from lumiere.files import LOCK_NAME, locked
from lumiere.persistence import liveness
from lumiere.persistence.catalog import check_removable, remove_run
from lumiere.persistence.liveness import FRESH_SECONDS, HEARTBEAT_NAME, beating, this_process
from lumiere.persistence.runs import Run, RunStore

ELSEWHERE = {"host": "node7", "pid": 4242, "boot_id": "0f1e2d3c"}


@pytest.fixture
def run() -> Run:
    """A run that says that it is running on another host, whose lock nobody here sees."""
    run = RunStore().create()
    with locked(run.path):
        run.update(status="running", **ELSEWHERE)
    return run


def age(run: Run, seconds: float, *names: str) -> None:
    """Let files of a run, all of them if none is named, be last written so long ago."""
    for path in [run.path / name for name in names] or list(run.path.iterdir()):
        written_at = time.time() - seconds
        os.utime(path, (written_at, written_at))


@pytest.mark.parametrize("name", [HEARTBEAT_NAME, "metrics.jsonl", "run.json"])
@pytest.mark.parametrize("record", [ELSEWHERE, {"host": "node7", "pid": 4242}])
def test_a_run_on_another_host_runs_while_any_of_its_files_is_fresh(run: Run, name: str, record: dict) -> None:
    run.update(**{"boot_id": None} | record)
    (run.path / name).touch()
    age(run, FRESH_SECONDS + 60)
    assert run.status == "crashed"
    check_removable(run)
    age(run, FRESH_SECONDS - 60, name)
    assert run.status == "running"
    for refused in (check_removable, remove_run, Run.check_not_elsewhere):
        with pytest.raises(RunBusyError, match="node7"):
            refused(run)
    run.update(status="interrupted")
    remove_run(run)
    assert RunStore().all() == []


def test_the_clock_of_the_reader_does_not_matter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for hours in (-5, 5):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda real=time.time, hours=hours: real() + 3600 * hours)
            assert run.status == "running"
    age(run, -3600)  # stamped by a clock that is ahead: never deleted for that
    assert run.status == "running"


def test_without_its_host_a_run_has_nothing_but_the_lock(run: Run) -> None:
    run.update(host=None, boot_id=None)
    assert run.status == "crashed"


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    """A process that does nothing."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("lock", "ends", "heartbeat", "status"),
    [
        (True, False, 0, "crashed"),  # the lock is there, and free
        (False, False, 0, "running"),
        (False, False, FRESH_SECONDS + 60, "crashed"),  # another process may have got its number
        (False, False, None, "crashed"),
        (False, True, 0, "crashed"),
    ],
)
def test_on_this_host_the_lock_counts_and_without_it_the_process(
    run: Run, child: subprocess.Popen, lock: bool, ends: bool, heartbeat: float | None, status: str
) -> None:
    run.update(**this_process() | {"pid": child.pid})
    if ends:
        child.kill()
        child.wait()
    if heartbeat is not None:
        (run.path / HEARTBEAT_NAME).touch()
        age(run, heartbeat, HEARTBEAT_NAME)
    if not lock:
        (run.path / LOCK_NAME).unlink()
    assert run.status == status


def test_a_container_of_this_machine_is_this_machine(run: Run) -> None:
    boot_id = this_process()["boot_id"]
    if boot_id is None:
        pytest.skip("this system does not tell when it was started")
    run.update(boot_id=boot_id)
    assert run.status == "crashed", "its lock would be seen"


def test_after_a_restart_of_the_machine_its_runs_have_crashed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if this_process()["boot_id"] is None:
        pytest.skip("this system does not tell when it was started")
    run.update(**this_process() | {"boot_id": "the one before"})
    for name in (HEARTBEAT_NAME, "run.json"):
        (run.path / name).touch()
    age(run, 60)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: 30.0)
    assert run.status == "crashed"
    monkeypatch.setattr(time, "clock_gettime", lambda clock: 3000.0)
    assert run.status == "running", "another machine with the same name has written since this one started"


@pytest.mark.parametrize("pid", [None, True, -1, 0, "12", 2**62, 1.5])
def test_a_record_may_say_anything_of_its_process(run: Run, pid: Any) -> None:
    run.update(**this_process() | {"pid": pid})
    (run.path / HEARTBEAT_NAME).touch()
    (run.path / LOCK_NAME).unlink()
    assert run.status == "crashed"


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("it never came")


def test_the_heart_beats_while_a_run_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.01)
    path = tmp_path / HEARTBEAT_NAME
    with beating(tmp_path):
        for _ in range(2):
            os.utime(path, (1000, 1000))
            until(lambda: path.stat().st_mtime > 1000)
        path.unlink()
        time.sleep(0.03)
        assert not path.exists(), "a folder that is removed is not made again"
    with pytest.raises(ZeroDivisionError), beating(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_heart_beats_into_no_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    os.utime(target, (1000, 1000))
    (tmp_path / HEARTBEAT_NAME).symlink_to(target)
    with beating(tmp_path):
        assert target.stat().st_mtime == 1000
