"""How a training that torchrun starts again (`--max-restarts`) finds the run that it has made before."""

import os
import socket
import sys
from typing import Any

from lumiere.persistence.runs import Run, RunStore

NO_ID = "none"
"""What torchrun calls a job on one machine that was given no id."""


def job() -> dict[str, Any] | None:
    """What all starts of one torchrun have in common, as `run.json` keeps it; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    # Where the id says nothing, the job is known by the process that starts and watches this one.
    agent = f"{socket.gethostname()} {os.getppid()}" if name == NO_ID else None
    return {"id": name, "agent": agent, "arguments": sys.argv[1:]}


def restarted_run(store: RunStore) -> Run | None:
    """The run that an earlier start of this job has made or gone on with; None where this is the first start."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    return next((run for run in store.all() if run.config_path.exists() and run.record.get("job") == job()), None)
