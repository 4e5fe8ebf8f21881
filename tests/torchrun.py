"""Trainings by several processes of torchrun, and the comparison with others."""

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.config.schema import RunConfig
from lumiere.persistence.checkpoint import load_checkpoint
from lumiere.persistence.runs import Run, RunStore
from tests.checkpoints import folder_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TOLERANCE = 1e-6
"""Of weights about 1 and of losses: sums of float32 in another order."""
MUON_TOLERANCE = 2e-6
"""The same through the orthogonalisation, which raises differences of small singular values."""
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


def forked(num_processes: int, config: RunConfig, runs_dir: str, *options: str) -> Run:
    """The run of a config that is trained by copies of this process: without torchrun, in a fraction of the time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    arguments = ["train", written(config), "--runs-dir", runs_dir, *options]
    children = []
    for rank in range(num_processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_processes)}
        with warnings.catch_warnings(action="ignore"):  # Python 3.12 warns of threads that do not survive a fork
            child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= meeting | ranks
                result = CliRunner().invoke(app, arguments)
                code = result.exit_code
                if code:
                    print(rank, result.output, result.exception, file=sys.__stderr__, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * num_processes
    return RunStore(runs_dir).open("latest")


def written(config: RunConfig) -> str:
    path = Path("config.yaml")
    path.write_text(yaml.safe_dump(config.model_dump()))
    return str(path)


def trained(num_processes: int, config: RunConfig, runs_dir: str | None = None) -> Run:
    """The run of a config that is trained in a runs directory of its own."""
    runs_dir = runs_dir or f"by-{num_processes}-{config.training.parallel}"
    torchrun(num_processes, written(config), "--runs-dir", runs_dir)
    return RunStore(runs_dir).open("latest")


def tensors(run: Run, name: str = "latest") -> dict[str, torch.Tensor]:
    """Those of a checkpoint that do not depend on the number of processes in more than rounding."""
    return load_checkpoint(folder_of(run, name), ("model", "optimizer")).tensors()


def metrics(run: Run) -> list[dict[str, float]]:
    """The lines without what depends on the time."""
    timed = {"time", "tokens_per_second", "mfu"}
    lines = map(json.loads, run.metrics_path.read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)


def assert_same_state(run: Run, alone: Run, tolerance: float = TOLERANCE) -> None:
    assert_close(tensors(run), tensors(alone), tolerance)


def assert_same_training(run: Run, alone: Run, tolerance: float = TOLERANCE) -> None:
    assert_same_state(run, alone, tolerance)
    lines, expected_lines = metrics(run), metrics(alone)
    assert [line.keys() for line in lines] == [line.keys() for line in expected_lines]
    for line, expected_line in zip(lines, expected_lines, strict=True):
        # The perplexity is some hundred times the loss.
        assert line == pytest.approx(expected_line, rel=tolerance, abs=tolerance)
    assert (run.path / "tokenizer.json").read_bytes() == (alone.path / "tokenizer.json").read_bytes()
