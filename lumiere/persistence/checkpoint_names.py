"""What the checkpoints of a run are called. Importing this loads no torch: a shell asks here for names."""

from __future__ import annotations

import re

from lumiere.persistence.runs import Run

SUFFIX = ".safetensors"
NAMES = ("best", "latest", "previous")
NAME_PATTERN = re.compile(r"best|latest|previous|step-[0-9]{8,}")


def checkpoint_names(run: Run) -> list[str]:
    """The checkpoints that a run has: `best`, `latest`, `previous`, then the snapshots by step."""
    found = {path.name.removesuffix(SUFFIX) for path in run.checkpoints_dir.glob(f"*{SUFFIX}")}
    steps = sorted((name for name in found - set(NAMES) if NAME_PATTERN.fullmatch(name)), key=_step)
    return [name for name in NAMES if name in found] + steps


def snapshot_steps(run: Run) -> list[int]:
    """The steps whose weights the run has kept, rising."""
    return [_step(name) for name in checkpoint_names(run) if name not in NAMES]


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))
