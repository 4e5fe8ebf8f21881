"""Runs that the commands find without `--runs-dir`."""

from typing import Any

import pytest

from lumiere.models.transformer import Transformer
from lumiere.persistence import loading
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run


@pytest.fixture(autouse=True)
def runs_dir(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(trained_run.path.parent))


@pytest.fixture
def without_corpus(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained run was trained on another corpus than the one that its config names."""
    monkeypatch.setattr(type(trained_run), "record", RunRecord(corpus_sha256="another"))


@pytest.fixture
def uniform_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained model has an embedding of zeros: all 320 tokens are always tied."""
    load = loading.load_weights

    def load_zeros(*arguments: Any) -> Transformer:
        model = load(*arguments)
        model.token_embedding.weight.data.zero_()
        return model

    monkeypatch.setattr(loading, "load_weights", load_zeros)
