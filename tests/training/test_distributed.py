"""Training by several processes, compared with the same training by one; and what happens if one of them is lost."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from lumiere.config.schema import RunConfig
from lumiere.errors import NonFiniteError
from lumiere.persistence.runs import Run, RunStore
from tests.midway import midway
from tests.torchrun import (
    CONSTANT,
    MUON_TOLERANCE,
    NO_DROPOUT,
    TOLERANCE,
    assert_close,
    assert_same_state,
    assert_same_training,
    command,
    forked,
    metrics,
    tensors,
    torchrun,
    trained,
    written,
)
from tests.training.short import bits, damage, files_of, hashes, names, resume, short, train


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_what_one_does(parallel: str) -> None:
    """Over the end of an epoch, whose last batch is smaller."""
    config = short(NO_DROPOUT, parallel=parallel)
    run = forked(2, config, "by-2")
    assert_same_training(run, train(config).run)
    assert (run.status, run.record.world_size) == ("finished", 2)
    assert [other.name for other in RunStore(run.path.parent).all()] == [run.name]


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "parallel"), [(4, "ddp"), (3, "fsdp")])
def test_any_number_of_processes_trains_what_one_does(num_processes: int, parallel: str) -> None:
    """With everything that has a state.

    The last batch of an epoch has fewer windows than there are processes. Neither the width nor the number of Muon's
    matrices divides by three.
    """
    parts = {"gradient_accumulation_steps": 12 // num_processes, "activation_checkpointing": parallel == "fsdp"}
    changes = {"optimizer": "muon", "ema_decay": 0.9, "gradient_clip_norm": 0.5, "random_window_offset": True}
    config = short(NO_DROPOUT, parallel=parallel, **changes, **parts)
    assert_same_training(trained(num_processes, config), train(config).run, MUON_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "other"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_resuming_is_exact_with_as_many_processes_either_way_and_warns_with_another_number(
    parallel: str, other: str
) -> None:
    """With dropout and an average of the weights."""
    changes: dict[str, Any] = {"optimizer": "muon", "ema_decay": 0.9, "parallel": parallel}
    whole = trained(2, short(CONSTANT, **changes), "whole")
    half = trained(2, short(CONSTANT, **changes, max_steps=4), "half")
    by_two, by_one = (Run(shutil.copytree(half.path, Path(folder, half.name))) for folder in ("by-two", "by-one"))
    longer = "training.max_steps=8"

    torchrun(2, "--resume", half.id, "--runs-dir", "half", "--set", longer)
    assert half.record.step == 8
    assert hashes(half) == hashes(whole)

    torchrun(2, "--resume", half.id, "--runs-dir", "by-two", "--set", longer, "--set", f"training.parallel={other}")
    assert_same_state(by_two, whole, MUON_TOLERANCE)

    resumed = resume(by_one, overrides=[longer])
    assert (resumed.state.step, by_one.record.world_size) == (8, 1)
    [warning] = resumed.warnings
    assert f"2 processes ({parallel})" in warning
    assert "dropout masks" in warning
    assert hashes(by_one) != hashes(whole)


@pytest.mark.slow
def test_each_process_has_its_own_dropout_masks() -> None:
    """Two processes with the same masks would train on, only worse; their first loss would be that of one process."""
    config = short(max_steps=1)
    alone = train(config).run
    assert metrics(trained(2, config))[0]["loss"] != pytest.approx(metrics(alone)[0]["loss"], rel=TOLERANCE)


# FSDP


@pytest.mark.slow
def test_bfloat16_has_the_same_masters_as_with_all_weights_in_each_process() -> None:
    """With bfloat16, one process' larger batch rounds elsewhere than two smaller ones: so beside two."""
    changes: dict[str, Any] = {"precision": "bfloat16", "optimizer": "muon", "gradient_clip_norm": None}
    sharded, whole = (trained(2, short(parallel=parallel, **changes)) for parallel in ("fsdp", "ddp"))
    assert {tensor.dtype for tensor in tensors(sharded).values()} == {torch.float32}
    # To the bit: two numbers have one sum, whoever adds them, and nothing is clipped.
    assert bits(tensors(sharded)) == bits(tensors(whole))


@pytest.mark.slow
def test_blocks_may_be_compiled() -> None:
    config = short(NO_DROPOUT, parallel="fsdp", compile=True)
    assert_same_training(trained(2, config), train(config).run, MUON_TOLERANCE)


@pytest.mark.slow
def test_a_checkpoint_that_is_too_large_for_one_process_is_a_folder_to_go_on_from() -> None:
    """With as many processes to the bit, also where the newest one is damaged; with another number and one as ever."""
    settings: dict[str, Any] = {"parallel": "fsdp", "optimizer": "muon", "ema_decay": 0.9}
    expected = tensors(trained(2, short(NO_DROPOUT | CONSTANT, **settings)))
    settings |= {"gather_limit_gb": 0.0, "max_steps": 4, "checkpoint_interval": 2, "snapshots": True}
    run = trained(2, short(NO_DROPOUT | CONSTANT, **settings), "folders")
    assert {file.name.split("-")[1] for file in files_of(run)} == {"00001", "00002"}
    assert names(run)[-1] == "step-00000004"
    folders = ("damaged", "by-four", "by-one")
    damaged, by_four, by_one = (Run(shutil.copytree(run.path, Path(folder, run.name))) for folder in folders)
    damage(damaged)

    for resumed, num_processes in ((run, 2), (damaged, 2), (by_four, 4)):
        folder = str(resumed.path.parent)
        torchrun(num_processes, "--resume", run.id, "--runs-dir", folder, "--set", "training.max_steps=8")
        assert_close(tensors(resumed), expected, 0.0 if num_processes == 2 else MUON_TOLERANCE)
    assert damaged.record.resumes[0]["step"] == 2

    resume(by_one, overrides=["training.max_steps=8", "training.parallel=ddp"])
    assert_close(tensors(by_one), expected, MUON_TOLERANCE)
    assert "model.safetensors" in {file.name for file in files_of(by_one)}


# Lost processes: about a hundred steps in epochs of 55, caught after the first evaluation

LONG = CONSTANT | {"dataset.num_documents": 10, "training.max_steps": 150}
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")


@contextmanager
def two_midway(
    config: RunConfig, *options: str, max_restarts: int = 0
) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Two processes that train in `stopped/`, after their first evaluation, and their remaining messages."""
    with midway(command(2, written(config), "--runs-dir", "stopped", *options, max_restarts=max_restarts)) as started:
        yield started


def stopped_run() -> Run:
    return RunStore("stopped").open("latest")


def resume_stopped() -> Run:
    run = stopped_run()
    torchrun(2, "--resume", run.id, "--runs-dir", "stopped")
    assert run.record.step == 150
    return run


def worker(torchrun: int, rank: int) -> int:
    """The id of the process of that rank."""
    for name in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{name}/environ").read_text().split("\0"):
            return int(name)
    raise AssertionError(f"torchrun has no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "parallel"), [(signal.SIGINT, "ddp"), (signal.SIGTERM, "ddp"), (signal.SIGTERM, "fsdp")]
)
def test_a_signal_to_torchrun_saves_once_and_the_run_resumes(number: int, parallel: str) -> None:
    config = short(LONG, parallel=parallel)
    whole = trained(2, config)
    with two_midway(config) as (process, stderr):
        process.send_signal(number)
        said = stderr.read()
        process.wait(timeout=60)
    run = stopped_run()
    assert said.count("interrupted at step") == 1
    assert run.status == "interrupted"
    assert 0 < (run.record.step or 0) < 150
    assert hashes(resume_stopped()) == hashes(whole)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "parallel"), [(0, "ddp"), (1, "ddp"), (1, "fsdp")])
def test_a_killed_process_ends_the_job_which_names_it(rank: int, parallel: str) -> None:
    with two_midway(short(LONG, parallel=parallel)) as (process, stderr):
        victim, other = worker(process.pid, rank), worker(process.pid, 1 - rank)
        os.kill(victim, signal.SIGKILL)
        said = stderr.read()
        assert process.wait(timeout=60) != 0
    _, root_cause = said.split("Root Cause")
    assert f"rank      : {rank} " in root_cause
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in root_cause
    assert not Path(f"/proc/{other}").exists()
    assert stopped_run().status in ("failed", "crashed")
    resume_stopped()


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "parallel"), [(0, "ddp"), (1, "ddp"), (1, "fsdp")])
def test_a_hanging_process_ends_the_job_which_names_it(rank: int, parallel: str) -> None:
    with two_midway(short(LONG, parallel=parallel, rank_timeout=2)) as (process, stderr):
        victim = worker(process.pid, rank)
        os.kill(victim, signal.SIGSTOP)
        said = []
        for line in stderr:
            said.append(line)
            if line.startswith("hint: "):
                break
        os.kill(victim, signal.SIGKILL)  # torchrun waits for that
        said += stderr.readlines()
        assert process.wait(timeout=60) != 0
    [error] = [line for line in said if line.startswith("error: ")]
    assert f"rank {rank} of 2 " in error
    assert stopped_run().status == ("failed" if rank else "crashed")
    resume_stopped()


@needs_proc
@pytest.mark.slow
def test_a_job_that_torchrun_restarts_resumes_its_own_run() -> None:
    whole = trained(2, short(LONG))
    with two_midway(short(LONG), max_restarts=1) as (process, stderr):
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        said = stderr.read()
        assert process.wait(timeout=200) == 0, said
    [run] = RunStore("stopped").all()
    assert run.status == "finished"
    assert len(run.record.resumes) == 1
    assert hashes(run) == hashes(whole)


@needs_proc
@pytest.mark.slow
def test_a_restarted_job_needs_nothing_of_the_parent() -> None:
    parent = train(short(max_steps=2), runs_dir="stopped").run
    with two_midway(short(LONG), "--from", parent.id, max_restarts=1) as (process, stderr):
        shutil.rmtree(parent.path)
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        said = stderr.read()
        assert process.wait(timeout=200) == 0, said
    [run] = RunStore("stopped").all()
    assert (run.status, run.record.parent["run"], len(run.record.resumes)) == ("finished", parent.name, 1)


@pytest.mark.slow
def test_a_job_that_dies_without_a_run_adopts_none_of_another_job() -> None:
    """With the id of a job that is finished, and the same config."""
    script = f"exec {sys.executable} -m lumiere train {written(short(max_steps=2))}"
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "night"]
    options += ["--nproc-per-node", "1", "--max-restarts", "1", "--no-python", "sh", "-c"]
    for run in (script, f"test $TORCHELASTIC_RESTART_COUNT = 1 || exit 1; {script}"):
        launched = [sys.executable, "-m", "torch.distributed.run", *options, run]
        result = subprocess.run(launched, capture_output=True, text=True, env=os.environ, timeout=300)
        assert result.returncode == 0, result.stderr
    runs = RunStore().all()
    assert [(run.status, run.record.job["id"]) for run in runs] == [("finished", "night")] * 2


# Errors


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_nonfinite_loss_stops_all_processes_with_one_error(parallel: str) -> None:
    """A learning rate like this breaks a loss or a gradient, by one process and by two in the same step."""
    changes: dict[str, Any] = {"learning_rate": 1e10, "warmup_steps": 2, "parallel": parallel}
    config = short(NO_DROPOUT, **changes)
    with pytest.raises(NonFiniteError) as alone:
        train(config)
    launched = command(2, written(config), "--runs-dir", "failed")
    result = subprocess.run(launched, capture_output=True, text=True, env=os.environ, timeout=300)
    assert result.returncode != 0
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {alone.value.message.partition(':')[0]}: ")
    assert RunStore("failed").open("latest").status == "failed"
