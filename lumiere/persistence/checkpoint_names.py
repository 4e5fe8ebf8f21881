"""What the checkpoints of a run are called. Importing this loads no torch: a shell asks here for names."""

from __future__ import annotations

from lumiere.persistence.placing import found
from lumiere.persistence.runs import Run

NAMES = ("best", "latest", "previous")


def checkpoint_names(run: Run) -> list[str]:
    """The checkpoints that a run has: `best`, `latest`, `previous`, then the snapshots by step."""
    names = found(run.checkpoints_dir)
    return [name for name in NAMES if name in names] + sorted(names - set(NAMES), key=_step)


def snapshot_steps(run: Run) -> list[int]:
    """The steps whose weights the run has kept, rising."""
    return [_step(name) for name in checkpoint_names(run) if name not in NAMES]


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))
