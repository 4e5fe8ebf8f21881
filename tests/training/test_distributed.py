"""Trainings by several processes of torchrun, beside the same training by one."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import pytest

from lumiere.config.schema import RunConfig
from lumiere.errors import NonFiniteError
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.events import Event, WarningEvent
from lumiere.training.run import resume
from lumiere.training.setup import set_up_resume
from tests.midway import midway
from tests.torchrun import (
    CONSTANT,
    MUON_TOLERANCE,
    NO_DROPOUT,
    TOLERANCE,
    assert_same_training,
    command,
    metrics,
    torchrun,
    trained,
    written,
)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(configure, launch, parallel: str) -> None:
    """Over the end of an epoch, whose last batch is a smaller one."""
    config = configure(NO_DROPOUT | {"training.parallel": parallel})
    run = trained(2, config)
    assert_same_training(run, launch(config).run)
    assert run.status == "finished"
    assert run.record.world_size == 2
    assert [other.name for other in RunStore(run.path.parent).all()] == [run.name]


@pytest.mark.slow
def test_four_processes_train_what_one_does(configure, launch) -> None:
    """With all that has a state of its own; the last batch of an epoch has fewer windows than there are processes."""
    changes = {
        "training.optimizer": "muon",
        "training.ema_decay": 0.9,
        "training.gradient_accumulation_steps": 3,
        "training.gradient_clip_norm": 0.5,
        "training.random_window_offset": True,
    }
    config = configure(NO_DROPOUT | changes)
    run = trained(4, config)
    assert_same_training(run, launch(config).run, MUON_TOLERANCE)


@pytest.mark.slow
def test_going_on_with_as_many_processes_is_exact_and_with_another_number_says_what_is_not(
    configure, tensor_hashes
) -> None:
    whole = trained(2, configure(CONSTANT))
    half = trained(2, configure(CONSTANT | {"training.max_steps": 4}))
    by_one = Run(Path("by-one") / half.name)
    shutil.copytree(half.path, by_one.path)

    torchrun(2, "--resume", half.id, "--runs-dir", "by-2-ddp", "--set", "training.max_steps=8")
    assert half.record.step == 8
    assert tensor_hashes(half, "latest") == tensor_hashes(whole, "latest")

    events: list[Event] = []
    result = resume(set_up_resume(by_one, overrides=["training.max_steps=8"]), by_one, [events.append])
    assert result.state.step == 8
    [warning] = [event.message for event in events if isinstance(event, WarningEvent)]
    assert warning.startswith("trained so far with 2 processes (ddp), now with 1 process:")
    assert "dropout masks" in warning
    assert tensor_hashes(by_one, "latest") != tensor_hashes(whole, "latest")
    assert by_one.record.world_size == 1


@pytest.mark.slow
def test_each_process_drops_something_else(configure, launch) -> None:
    """Two processes with the same masks would train on, but worse; their first loss would be that of one process."""
    config = configure({"training.max_steps": 1})
    alone = launch(config).run
    assert metrics(trained(2, config))[0]["loss"] != pytest.approx(metrics(alone)[0]["loss"], rel=TOLERANCE)


def training_midway(
    config: RunConfig, max_restarts: int = 0
) -> AbstractContextManager[tuple[subprocess.Popen[str], IO[str]]]:
    """A training by two processes in `stopped/`, after its first evaluation, and what it goes on to say."""
    return midway(command(2, written(config), "--runs-dir", "stopped", max_restarts=max_restarts))


def worker(torchrun: int, rank: int) -> int:
    """The id of the process of that rank."""
    for name in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{name}/environ").read_text().split("\0"):
            return int(name)
    raise AssertionError(f"torchrun has no process of rank {rank}")


LONG = CONSTANT | {"dataset.num_documents": 10, "training.max_steps": 150, "training.snapshots": False}
"""Some hundred steps in epochs of 55: caught in the middle after the first."""


@pytest.fixture
def long_config(configure) -> RunConfig:
    return configure(LONG)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "parallel"), [(signal.SIGINT, "ddp"), (signal.SIGTERM, "ddp"), (signal.SIGTERM, "fsdp")]
)
def test_a_signal_to_torchrun_saves_once_and_the_run_goes_on(
    configure, number: int, parallel: str, tensor_hashes
) -> None:
    config = configure(LONG | {"training.parallel": parallel})
    whole = trained(2, config)
    with training_midway(config) as (process, stderr):
        process.send_signal(number)
        said = stderr.read()
        process.wait(timeout=60)
    run = RunStore("stopped").open("latest")
    assert said.count("interrupted at step") == 1
    assert run.status == "interrupted"
    assert 0 < (run.record.step or 0) < 150

    torchrun(2, "--resume", run.id, "--runs-dir", "stopped")
    assert tensor_hashes(run, "latest") == tensor_hashes(whole, "latest")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "parallel"), [(0, "ddp"), (1, "ddp"), (1, "fsdp")])
def test_a_process_that_is_killed_ends_the_job_which_names_it(configure, rank: int, parallel: str) -> None:
    long_config = configure(LONG | {"training.parallel": parallel})
    with training_midway(long_config) as (process, stderr):
        victim = worker(process.pid, rank)
        other = worker(process.pid, 1 - rank)
        os.kill(victim, signal.SIGKILL)
        said = stderr.read()
        assert process.wait(timeout=60) != 0
    _, root_cause = said.split("Root Cause")
    assert f"rank      : {rank} " in root_cause
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in root_cause
    assert not Path(f"/proc/{other}").exists()
    run = RunStore("stopped").open("latest")
    assert run.status in ("failed", "crashed")
    torchrun(2, "--resume", run.id, "--runs-dir", "stopped")
    assert run.record.step == 150


@needs_proc
@pytest.mark.slow
def test_a_job_that_torchrun_starts_again_goes_on_with_its_own_run(long_config: RunConfig, tensor_hashes) -> None:
    whole = trained(2, long_config)
    with training_midway(long_config, max_restarts=1) as (process, stderr):
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        said = stderr.read()
        assert process.wait(timeout=200) == 0, said
    [run] = RunStore("stopped").all()
    assert run.status == "finished"
    assert len(run.record.resumes) == 1
    assert tensor_hashes(run, "latest") == tensor_hashes(whole, "latest")


@pytest.mark.slow
def test_what_processes_cannot_share_is_said_once_and_makes_nothing(configure) -> None:
    config = written(configure({"training.gradient_accumulation_steps": 2}))
    result = subprocess.run(command(4, config), capture_output=True, text=True, env=os.environ, timeout=300)
    assert result.stderr.count("error: training.batch_size 12 cannot be shared evenly by 4 processes") == 1
    assert "hint: numbers of processes that fit: 1, 2, 3, 6; batch sizes that fit: 8, 16" in result.stderr
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_stops_all_and_is_said_once(configure, launch, parallel: str) -> None:
    """A learning rate like this breaks a loss or a gradient, by one process and by two in the same step."""
    changes = {"training.learning_rate": 1e10, "training.warmup_steps": 2, "training.parallel": parallel}
    config = configure(NO_DROPOUT | changes)
    with pytest.raises(NonFiniteError) as alone:
        launch(config)
    result = subprocess.run(
        command(2, written(config), "--runs-dir", "by-2"), capture_output=True, text=True, env=os.environ, timeout=300
    )
    step = alone.value.message.partition(":")[0]
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        line for line in result.stderr.splitlines() if line.startswith(f"error: {step}: ")
    ]
    assert result.stderr.count("error: ") == 1
    assert RunStore("by-2").open("latest").status == "failed"


def last_words(process: subprocess.Popen[str], stderr: IO[str], stopped: int) -> str:
    """What is said until the error about a process that was stopped, which is then killed: torchrun waits for that."""
    said = ""
    for line in stderr:
        said += line
        if line.startswith("hint: "):
            break
    os.kill(stopped, signal.SIGKILL)
    return said + stderr.read()


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "parallel"), [(0, "ddp"), (1, "ddp"), (1, "fsdp")])
def test_a_process_that_hangs_ends_the_job_which_names_it(configure, rank: int, parallel: str) -> None:
    config = configure(LONG | {"training.parallel": parallel, "training.rank_timeout": 2})
    with training_midway(config) as (process, stderr):
        victim = worker(process.pid, rank)
        os.kill(victim, signal.SIGSTOP)
        said = last_words(process, stderr, victim)
        assert process.wait(timeout=60) != 0
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"rank {rank} of 2 " in error
    run = RunStore("stopped").open("latest")
    assert run.status == ("failed" if rank else "crashed")
    torchrun(2, "--resume", run.id, "--runs-dir", "stopped")
    assert run.record.step == 150


@pytest.mark.slow
def test_a_job_that_dies_before_it_has_a_run_adopts_none_of_another_job(configure) -> None:
    """With the id of a job that is finished, and the same config."""
    config = written(configure({"training.max_steps": 2}))
    train = f"exec {sys.executable} -m lumiere train {config}"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "night"]
    options = [*meeting, "--nproc-per-node", "1", "--max-restarts", "1", "--no-python"]
    for script in (train, f"test $TORCHELASTIC_RESTART_COUNT = 1 || exit 1; {train}"):
        launched = [sys.executable, "-m", "torch.distributed.run", *options, "sh", "-c", script]
        result = subprocess.run(launched, capture_output=True, text=True, env=os.environ, timeout=300)
        assert result.returncode == 0, result.stderr
    runs = RunStore("runs").all()
    assert [run.status for run in runs] == ["finished", "finished"]
    assert [run.record.job["id"] for run in runs] == ["night", "night"]
