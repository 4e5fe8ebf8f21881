"""Metrics for Weights & Biases, in the folder `wandb` of the run. Never asks for a login, and never waits for long."""

import os
from typing import TYPE_CHECKING, Any

from lumiere.config.schema import RunConfig
from lumiere.persistence.runs import Run
from lumiere.training.events import EvaluationEvent, Event, Listener, StartEvent, StepEvent, WarningEvent
from lumiere.training.loggers.tags import figures

if TYPE_CHECKING:
    import wandb

PROJECT = "lumiere"
CONNECT_SECONDS = 20
"""How long to wait for the server at the start, before the run is kept offline."""
FINISH_SECONDS = 60
"""How long to wait at the end for what is not yet uploaded; it stays in the folder, to be synced by hand."""


class WandbLog:
    """A listener that writes a run of the same id; a resumed training goes on with it."""

    def __init__(self, config: RunConfig, run: Run, tell: Listener) -> None:
        self._config = config
        self._run = run
        self._tell = tell
        self._log: wandb.Run | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StartEvent):
            self._open(event.step)
        elif isinstance(event, StepEvent | EvaluationEvent) and self._log is not None:
            # The two of one step are merged; steps that come again after a resume are left out by W&B.
            self._log.log(figures(event), step=event.step)

    def close(self, failed: bool) -> None:
        if self._log is not None:
            self._log.finish(exit_code=int(failed))

    def _open(self, step: int) -> None:
        import wandb

        mode = wandb.setup(wandb.Settings(silent=True, console="off")).settings.mode
        reason = "WANDB_MODE says so" if mode in ("offline", "dryrun") else None
        if reason is None and mode != "disabled":
            if not has_key():
                reason = "no API key is configured"
            else:
                try:
                    self._log = self._init(None)
                except wandb.Error as error:
                    # The attempt still holds the run's id in W&B's background process.
                    wandb.teardown()
                    reason = f"the server cannot be used ({' '.join(str(error).split())})"
        if reason is not None:
            path = self._run.path / "wandb"
            how = f"wandb sync {path}/offline-run-*-{self._run.id}"
            self._tell(WarningEvent(step, f"wandb keeps this run offline, because {reason}; upload it with {how}"))
            self._log = self._init("offline")

    def _init(self, mode: Any) -> "wandb.Run":
        import wandb

        # Nothing on the screen, no code, no machine's figures: what is asked for is the metrics.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_stats=True,
            init_timeout=CONNECT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=self._run.id,
            name=self._run.name,
            dir=str(self._run.path),
            config=self._config.model_dump(),
            resume="allow",
            reinit="create_new",
            mode=mode,
            settings=settings,
        )


def has_key() -> bool:
    """Whether W&B finds credentials; it would ask for them on a terminal otherwise."""
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.Error:
        return False  # what is configured does not even look like a key
