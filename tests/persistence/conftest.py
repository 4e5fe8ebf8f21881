"""What tests of stored runs share."""

from pathlib import Path

import pytest

from lumiere.persistence.runs import Run, RunStore


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """An empty store, in the folder that `RunStore()` takes."""
    return RunStore(tmp_path / "runs")


@pytest.fixture
def run(store: RunStore) -> Run:
    """A run without files."""
    return store.create()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where to write a file of metrics."""
    return tmp_path / "metrics.jsonl"
