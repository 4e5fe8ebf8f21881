"""What the tests of all analyses share."""

import pytest

from lumiere.persistence.runs import Run


@pytest.fixture
def runs_dir(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of the trained run, in which every command looks without `--runs-dir`."""
    path = str(trained_run.path.parent)
    monkeypatch.setenv("LUMIERE_RUNS_DIR", path)
    return path
