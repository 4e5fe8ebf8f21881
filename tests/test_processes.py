"""Real processes: what a shell sees, and what a signal does."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import pytest
import yaml

from lumiere.config.schema import RunConfig
from lumiere.persistence.checkpoint import load_checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore
from tests.checkpoints import folder_of
from tests.midway import midway

LUMIERE = [sys.executable, "-m", "lumiere"]


def run_lumiere(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, with one thread, so that sums are the same in all of them."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([*LUMIERE, *arguments], capture_output=True, text=True, env=variables, timeout=300)


@pytest.fixture
def long_config(tiny_config: RunConfig, tmp_path: Path) -> str:
    """A training of 400 tiny steps: long enough to be caught in the middle."""
    values = tiny_config.model_dump()
    values["training"] |= {"max_steps": 400, "eval_interval": 100, "log_interval": 1, "snapshots": False}
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def training_midway(config: str) -> AbstractContextManager[tuple[subprocess.Popen[str], IO[str]]]:
    """A training in `stopped/`, after its first evaluation, and what it goes on to say."""
    return midway([*LUMIERE, "train", config, "--runs-dir", "stopped"])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed_equals_never_stopped(long_config: str, number: int, code: int) -> None:
    whole = json.loads(run_lumiere("train", long_config, "--json").stdout)
    with training_midway(long_config) as (process, stderr):
        process.send_signal(number)
        rest = stderr.read()
        assert process.wait(timeout=60) == code, rest
    store = RunStore("stopped")
    run = store.open("latest")
    assert run.record.status == "interrupted"
    assert 0 < (run.record.step or 0) < 400
    assert f"lumiere train --resume {run.id}" in rest

    resumed = run_lumiere("train", "--resume", run.id, "--runs-dir", "stopped", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["best_loss"] == whole["best_loss"]
    ends = [load_checkpoint(folder_of(ended, "latest")).tensors() for ended in (run, RunStore().open("latest"))]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert tensor.equal(ends[1][name]), name
    steps = [json.loads(row)["step"] for row in run.metrics_path.read_text().splitlines()]
    assert steps == sorted(steps)
    assert set(steps) == set(range(1, 401))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.002, 0.01, 0.03])
def test_a_second_ctrl_c_leaves_at_once_and_harms_nothing(long_config: str, seconds: float) -> None:
    """Whether it comes before, during or after the save that the first one asked for."""
    with training_midway(long_config) as (process, stderr):
        process.send_signal(signal.SIGINT)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        rest = stderr.read()
        assert process.wait(timeout=60) in (130, -signal.SIGINT), rest
    run = RunStore("stopped").open("latest")
    assert run.status in ("interrupted", "crashed")
    assert not [path for path in run.path.rglob("*") if path.name.endswith((".tmp", ".temporary"))]
    for name in CheckpointManager("stopped").names(run):
        CheckpointManager("stopped").load(run, name)

    resumed = run_lumiere("train", "--resume", run.id, "--runs-dir", "stopped", "--json")
    assert resumed.returncode == 0, resumed.stderr
    steps = [json.loads(row)["step"] for row in run.metrics_path.read_text().splitlines()]
    assert steps == sorted(steps)
    assert set(steps) == set(range(1, 401))


@pytest.mark.slow
def test_without_a_network_training_the_card_says_so_in_two_lines() -> None:
    result = run_lumiere("train", "small", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert result.returncode == 2
    assert result.stdout == ""
    error, hint = result.stderr.splitlines()
    assert "'Salesforce/wikitext' is not on this machine" in error
    assert "--set dataset.name=" in hint
    assert "lumiere train tiny" in hint
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(trained_run: Run) -> None:
    command = " ".join(
        [*LUMIERE, "generate", "--runs-dir", str(trained_run.path.parent), "-n", "200", "|", "head", "-c", "1"]
    )
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    assert b"Traceback" not in result.stderr
    assert b"BrokenPipe" not in result.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["runs", "show", "nothing"], 2)])
@pytest.mark.parametrize("size", [1, 2])
def test_one_of_several_processes_leaves_without_the_interpreters_ending(
    arguments: list[str], code: int, size: int
) -> None:
    """Where threads of gloo might ask for it; what was written comes out all the same."""
    script = "import atexit, sys; atexit.register(print, 'ended'); from lumiere.cli import main; main()"
    world = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size)) | dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
    environment = os.environ | world | {"MASTER_ADDR": "a"}
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == code
    assert ("ended" in result.stdout) == (size == 1)
    assert ("lumiere" in result.stdout) == (code == 0)
    assert ("error: " in result.stderr) == (code == 2)
