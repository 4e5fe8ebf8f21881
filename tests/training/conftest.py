"""Short trainings: one layer and one story, in epochs of five steps, the last of them with fewer windows."""

import functools
import hashlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from lumiere import device as device_module
from lumiere.config.loader import validate
from lumiere.config.schema import RunConfig
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import run as run_module
from lumiere.training.events import Callback, Event, StepEvent
from lumiere.training.run import environment, start
from lumiere.training.setup import set_up
from lumiere.training.trainer import TrainingResult

Configure = Callable[[Mapping[str, Any]], RunConfig]
Launch = Callable[..., TrainingResult]
TensorHashes = Callable[[Run, str], dict[str, str]]

SHORT = {
    "model.num_layers": 1,
    "dataset.num_documents": 1,
    "dataset.seed": 1,  # a story whose last window is padded
    "training.batch_size": 12,
    "training.max_steps": 6,
    "training.eval_interval": None,
    "training.log_interval": 1,
}


PEAK_FLOPS = 2e11
"""What the device is said to reach."""

environment_once = functools.cache(environment)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is a matter of tests/persistence, and one look at the machine is enough for all."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(run_module, "environment", environment_once)
    monkeypatch.setattr(device_module, "peak_flops", lambda device, dtype: PEAK_FLOPS)


@pytest.fixture(scope="session")
def configure(tiny_config: RunConfig) -> Configure:
    """Makes the config of a short training with changes by dotted path."""

    def changed(changes: Mapping[str, Any]) -> RunConfig:
        values = tiny_config.model_dump()
        for path, value in (SHORT | dict(changes)).items():
            section, leaf = path.split(".")
            values[section][leaf] = value
        return validate(values)

    return changed


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Trains a config in a runs directory of this test, which is the current folder's."""

    def trained(
        config: RunConfig, callbacks: Sequence[Callback] = (), processes: ProcessGroup = SINGLE_PROCESS
    ) -> TrainingResult:
        return start(set_up(config), RunStore(tmp_path / "runs"), callbacks=callbacks, processes=processes)

    return trained


@pytest.fixture(scope="session")
def stop_at() -> Callable[[int], Callback]:
    """Makes a callback that is Ctrl-C during a step."""

    def at(step: int) -> Callback:
        def listen(event: Event) -> None:
            if isinstance(event, StepEvent) and event.step == step:
                signal.raise_signal(signal.SIGINT)

        return listen

    return at


@pytest.fixture(scope="session")
def tensor_hashes() -> TensorHashes:
    """Gives the SHA-256 of every tensor in a checkpoint, read without any code of ours."""

    def read(run: Run, name: str) -> dict[str, str]:
        # Of a folder, which one process has written: each of its files has whole tensors.
        files = [run.checkpoints_dir / f"{name}.safetensors"]
        files = files if files[0].exists() else list((run.checkpoints_dir / name).glob("*.safetensors"))
        tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
        return {
            key: hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()).hexdigest()
            for key, tensor in sorted(tensors.items())
        }

    return read
