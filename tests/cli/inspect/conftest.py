"""What the tests of all analyses share."""

from typing import Any

import pytest

from lumiere.models.transformer import Transformer
from lumiere.persistence import loading
from lumiere.persistence.runs import Run


@pytest.fixture
def runs_dir(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of the trained run, in which every command looks without `--runs-dir`."""
    path = str(trained_run.path.parent)
    monkeypatch.setenv("LUMIERE_RUNS_DIR", path)
    return path


@pytest.fixture
def uniform_model(runs_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command opens the trained model with an embedding of zeros: all 320 tokens are always tied."""
    load = loading.load_weights

    def load_zeros(*arguments: Any) -> Transformer:
        model = load(*arguments)
        model.token_embedding.weight.data.zero_()
        return model

    monkeypatch.setattr(loading, "load_weights", load_zeros)
