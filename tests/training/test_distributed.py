"""Trainings by several processes of torchrun, beside the same training by one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lumiere.config.schema import RunConfig
from lumiere.errors import NonFiniteError
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.events import Event, WarningEvent
from lumiere.training.launch import resume
from lumiere.training.preparation import prepare_resume
from tests.midway import midway

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TOLERANCE = 2e-6
"""Of weights about 1 and of losses: sums of float32 in another order."""
NO_DROPOUT = {"model.dropout": 0.0}
CONSTANT = {"training.schedule": "constant", "training.max_steps": 8}


def command(num_processes: int, *arguments: str, max_restarts: int = 0) -> list[str]:
    options = ["--nproc-per-node", str(num_processes), "--max-restarts", str(max_restarts)]
    return [*TORCHRUN, *options, "-m", "lumiere", "train", *arguments]


def torchrun(num_processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    result = subprocess.run(
        command(num_processes, *arguments), capture_output=True, text=True, env=variables, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result


def written(config: RunConfig) -> str:
    path = Path("config.yaml")
    path.write_text(yaml.safe_dump(config.model_dump()))
    return str(path)


def trained(num_processes: int, config: RunConfig) -> Run:
    """The run of a config that is trained in a runs directory of its own."""
    runs_dir = f"by-{num_processes}"
    torchrun(num_processes, written(config), "--runs-dir", runs_dir)
    return RunStore(runs_dir).open("latest")


def tensors(run: Run, name: str = "latest") -> dict[str, torch.Tensor]:
    """Those of a checkpoint that do not depend on the number of processes in more than rounding."""
    found = load_file(run.checkpoints_dir / f"{name}.safetensors")
    return {key: tensor for key, tensor in found.items() if not key.startswith("rng.")}


def metrics(run: Run) -> list[dict[str, float]]:
    """The lines without what depends on the time."""
    timed = {"time", "tokens_per_second", "mfu"}
    lines = map(json.loads, run.metrics_path.read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def assert_same_training(run: Run, alone: Run) -> None:
    found, expected = tensors(run), tensors(alone)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE, msg=lambda text, name=name: name + text)
    lines, expected_lines = metrics(run), metrics(alone)
    assert [line.keys() for line in lines] == [line.keys() for line in expected_lines]
    for line, expected_line in zip(lines, expected_lines, strict=True):
        # The perplexity is some hundred times the loss.
        assert line == pytest.approx(expected_line, rel=TOLERANCE, abs=TOLERANCE)
    assert (run.path / "tokenizer.json").read_bytes() == (alone.path / "tokenizer.json").read_bytes()


def test_two_processes_train_what_one_does(configure, launch) -> None:
    """Over the end of an epoch, whose last batch is a smaller one."""
    config = configure(NO_DROPOUT)
    run = trained(2, config)
    assert_same_training(run, launch(config).run)
    assert run.status == "finished"
    assert run.record["world_size"] == 2
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
    assert_same_training(run, launch(config).run)


@pytest.mark.slow
def test_going_on_with_as_many_processes_is_exact_and_with_another_number_says_what_is_not(
    configure, tensor_hashes
) -> None:
    whole = trained(2, configure(CONSTANT))
    half = trained(2, configure(CONSTANT | {"training.max_steps": 4}))
    by_one = Run(Path("by-one") / half.name)
    shutil.copytree(half.path, by_one.path)

    torchrun(2, "--resume", half.id, "--runs-dir", "by-2", "--set", "training.max_steps=8")
    assert half.record["step"] == 8
    assert tensor_hashes(half, "latest") == tensor_hashes(whole, "latest")

    events: list[Event] = []
    result = resume(prepare_resume(by_one, overrides=["training.max_steps=8"]), by_one, [events.append])
    assert result.state.step == 8
    [warning] = [event.message for event in events if isinstance(event, WarningEvent)]
    assert warning.startswith("trained so far with 2 processes, now with 1")
    assert "dropout masks" in warning
    assert tensor_hashes(by_one, "latest") != tensor_hashes(whole, "latest")
    assert by_one.record["world_size"] == 1


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


@pytest.fixture
def long_config(configure) -> RunConfig:
    """Some hundred steps in epochs of 55: caught in the middle after the first."""
    return configure(CONSTANT | {"dataset.num_documents": 10, "training.max_steps": 150, "training.snapshots": False})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_once_and_the_run_goes_on(
    long_config: RunConfig, number: int, tensor_hashes
) -> None:
    whole = trained(2, long_config)
    with training_midway(long_config) as (process, stderr):
        process.send_signal(number)
        said = stderr.read()
        process.wait(timeout=60)
    run = RunStore("stopped").open("latest")
    assert said.count("interrupted at step") == 1
    assert run.status == "interrupted"
    assert 0 < run.record["step"] < 150

    torchrun(2, "--resume", run.id, "--runs-dir", "stopped")
    assert tensor_hashes(run, "latest") == tensor_hashes(whole, "latest")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_job_which_names_it(long_config: RunConfig, rank: int) -> None:
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
    assert run.record["step"] == 150


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
    assert len(run.record["resumes"]) == 1
    assert tensor_hashes(run, "latest") == tensor_hashes(whole, "latest")


@pytest.mark.slow
def test_what_processes_cannot_share_is_said_once_and_makes_nothing(configure) -> None:
    config = written(configure({"training.gradient_accumulation_steps": 2}))
    result = subprocess.run(command(4, config), capture_output=True, text=True, env=os.environ, timeout=300)
    assert result.stderr.count("error: training.batch_size 12 cannot be shared evenly by 4 processes") == 1
    assert "hint: numbers of processes that fit: 1, 2, 3, 6; batch sizes that fit: 8, 16" in result.stderr
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_and_is_said_once(configure, launch) -> None:
    """A learning rate like this breaks a loss or a gradient, by one process and by two in the same step."""
    config = configure(NO_DROPOUT | {"training.learning_rate": 1e10, "training.warmup_steps": 2})
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
