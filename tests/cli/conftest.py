"""What the tests of all commands share."""

import shutil
from pathlib import Path

import pytest

from lumiere.persistence.runs import Run


@pytest.fixture
def run(trained_run: Run) -> Run:
    """A copy of the trained run, alone in the runs directory, to be changed."""
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    return Run(Path("runs") / trained_run.name)
