"""What every test of training shares; short runs are in `short.py`."""

import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from lumiere import device as device_module
from lumiere.config.loader import dump_config
from lumiere.config.schema import RunConfig
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import run as run_module
from lumiere.training.events import Callback
from lumiere.training.run import environment
from lumiere.training.trainer import TrainingResult
from tests.training import short


class TrainedOnce(Protocol):
    def __call__(self, config: RunConfig, *, stop: int | None = None) -> Run: ...


environment_once = functools.cache(environment)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is a matter of tests/persistence, and one look at the machine is enough for all."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(run_module, "environment", environment_once)
    monkeypatch.setattr(device_module, "peak_flops", lambda device, dtype: short.PEAK_FLOPS)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("originals")


@pytest.fixture
def trained_once(originals: Path) -> TrainedOnce:
    """Copies of runs, to be changed: a config is trained once for all tests, to its end or interrupted at a step."""

    def copied(config: RunConfig, *, stop: int | None = None) -> Run:
        key = hashlib.sha256(f"{dump_config(config)}{stop}".encode()).hexdigest()
        store = RunStore(originals / key)
        if not store.all():
            short.train(config, *([short.stop_at(stop)] if stop else []), runs_dir=str(store.runs_dir))
        (original,) = store.all()
        return Run(shutil.copytree(original.path, Path("runs", original.name)))

    return copied


@pytest.fixture
def interrupted(trained_once: TrainedOnce) -> Run:
    """A run of `short()` that was interrupted at step 3."""
    return trained_once(short.short(), stop=3)


@pytest.fixture(scope="session")
def configure() -> Callable[..., RunConfig]:
    return short.short


@pytest.fixture
def launch() -> Callable[..., TrainingResult]:
    return lambda config, callbacks=(): short.train(config, *callbacks).result


@pytest.fixture(scope="session")
def stop_at() -> Callable[[int], Callback]:
    return short.stop_at


@pytest.fixture(scope="session")
def tensor_hashes() -> Callable[..., dict[str, str]]:
    return short.hashes
