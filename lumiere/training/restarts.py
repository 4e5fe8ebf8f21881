"""How a training that torchrun starts again (`--max-restarts`) finds the run that it has made before."""

import os
import socket
import sys
from typing import Any

from lumiere.components.world import World
from lumiere.persistence.runs import Run, RunStore


def job(world: World) -> dict[str, Any] | None:
    """Describe this launch of torchrun for `run.json`; None without torchrun. `token` alone identifies it."""
    if world.job is None:
        return None
    return {
        "id": os.environ.get("TORCHELASTIC_RUN_ID"),
        "agent": f"{socket.gethostname()} {os.getppid()}",
        "arguments": sys.argv[1:],
        "token": world.job,
    }


def restarted_run(store: RunStore, world: World) -> Run | None:
    """Return the run that an earlier start of this very launch has made or resumed; None if there is none."""
    if world.job is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    return next((run for run in store.all() if run.config_path.exists() and token(run) == world.job), None)


def token(run: Run) -> str | None:
    """The token of the launch that trained the run last, by its record."""
    recorded = run.record.get("job")
    return recorded.get("token") if isinstance(recorded, dict) else None
