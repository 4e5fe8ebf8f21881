"""What every test of training shares; short runs are in `short.py`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from lumiere import device as device_module
from lumiere.config.schema import RunConfig
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.files import Disk
from lumiere.persistence.runs import Run
from lumiere.training import run as run_module
from lumiere.training.events import Callback
from lumiere.training.run import environment
from lumiere.training.trainer import TrainingResult
from tests.training import short

Configure = Callable[[Mapping[str, Any]], RunConfig]
Launch = Callable[..., TrainingResult]
TensorHashes = Callable[[Run, str], dict[str, str]]

environment_once = functools.cache(environment)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is a matter of tests/persistence, and one look at the machine is enough for all."""
    monkeypatch.setattr(Disk, "fsync", lambda disk, descriptor: None)
    monkeypatch.setattr(run_module, "environment", environment_once)
    monkeypatch.setattr(device_module, "peak_flops", lambda device, dtype: short.PEAK_FLOPS)


@pytest.fixture(scope="session")
def configure() -> Configure:
    return short.short


@pytest.fixture
def launch() -> Launch:
    def trained(
        config: RunConfig, callbacks: Sequence[Callback] = (), processes: ProcessGroup = SINGLE_PROCESS
    ) -> TrainingResult:
        return short.train(config, *callbacks, processes=processes).result

    return trained


@pytest.fixture(scope="session")
def stop_at() -> Callable[[int], Callback]:
    return short.stop_at


@pytest.fixture(scope="session")
def tensor_hashes() -> TensorHashes:
    return short.hashes
