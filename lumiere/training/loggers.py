"""Loggers of a run: `metrics.jsonl`, TensorBoard, W&B, Trackio. A failing one is dropped with a warning."""

import io
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from lumiere.config.loader import dump_config, flat_settings
from lumiere.config.schema import RunConfig
from lumiere.errors import LumiereError
from lumiere.files import is_writable
from lumiere.persistence.metrics import MetricsWriter
from lumiere.persistence.runs import Run
from lumiere.programs import install_command
from lumiere.training.events import Callback, EvaluationEvent, Event, StartEvent, StepEvent, WarningEvent, to_all

STEP_METRICS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
EVALUATION_METRICS = ("loss", "perplexity", "bits_per_byte")
DECIMALS = {"epoch": 6, "time": 3, "tokens_per_second": 1, "mfu": 4}
"""Digits after the point in `metrics.jsonl`; other numbers are written in full."""
PROJECT = "lumiere"
CONNECT_SECONDS = 20
"""How long to wait for W&B's server at the start."""
FINISH_SECONDS = 60
"""How long to wait at the end for what is not yet uploaded; it stays in the folder, to be synced by hand."""
TRACKIO_REMOTES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Variables by which Trackio would send the metrics elsewhere."""
MAX_STEPS = 10**15


def metrics_log(writer: MetricsWriter) -> Callback:
    """Return a callback that writes `metrics.jsonl`; docs/metrics.md has its names and units."""

    def write(event: Event) -> None:
        if isinstance(event, StepEvent | EvaluationEvent):
            progress = {"step": event.step, "epoch": event.epoch, "tokens": event.tokens, "time": event.seconds}
            line = progress | named_metrics(event, "", "val_")
            writer.write({name: round(line[name], DECIMALS[name]) if name in DECIMALS else line[name] for name in line})

    return write


def named_metrics(event: StepEvent | EvaluationEvent, step_prefix: str, evaluation_prefix: str) -> dict[str, float]:
    """Return the metrics of an event by name."""
    if isinstance(event, StepEvent):
        return {f"{step_prefix}{name}": getattr(event, name) for name in STEP_METRICS}
    return {f"{evaluation_prefix}{name}": getattr(event.evaluation, name) for name in EVALUATION_METRICS}


class Logger(Protocol):
    """An open log of metrics. Its methods may raise any exception."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of one event, by names such as `train/loss` and `val/loss`."""
        ...

    def close(self, failed: bool) -> None:
        """Write what is left; `failed` means that training ended with an error."""
        ...


class TensorBoardLog:
    """Writes event files, with the config as text and as hyperparameters.

    After a resume, the steps after the checkpoint are repeated; their first values are purged.
    """

    def __init__(self, config: RunConfig, run: Run, step: int, emit: Callback) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = run.path / "tensorboard"
        is_new = not folder.exists()
        # Values at `step` itself stay, except for a run that was killed before it saved anything.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        if is_new:
            self._add_config(config)

    def _add_config(self, config: RunConfig) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("config", f"```yaml\n{dump_config(config)}```", 0)
        settings = {
            path: value if isinstance(value, bool | int | float | str) else str(value)
            for path, value in flat_settings(config).items()
            if value is not None
        }
        # By hand, because `add_hparams` would open a second run under the first.
        for summary in hparams(settings, {"val/loss": 0.0, "train/loss": 0.0}):
            self._writer._get_file_writer().add_summary(summary, 0)
        self._writer.flush()

    def log(self, metrics: dict[str, float], step: int) -> None:
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, step)
        if "val/loss" in metrics:
            self._writer.flush()  # otherwise a kill could lose two minutes

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbLog:
    """Writes a W&B run of the same id, which a resume continues."""

    def __init__(self, config: RunConfig, run: Run, step: int, emit: Callback) -> None:
        import wandb

        reason = offline_reason()
        if reason is not None:
            how = f"wandb sync {run.path}/wandb/offline-run-*-{run.id}"
            emit(WarningEvent(step, f"wandb keeps this run offline, because {reason}; upload it with {how}"))
        # Only the metrics: no output, no code, no system statistics.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_stats=True,
            init_timeout=CONNECT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        self._log = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run.id,
            name=run.name,
            dir=str(run.path),
            config=config.model_dump(),
            resume="allow",
            reinit="create_new",
            mode=None if reason is None else "offline",
            settings=settings,
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        # W&B merges the two events of one step, and ignores steps that are repeated after a resume.
        self._log.log(metrics, step=step)

    def close(self, failed: bool) -> None:
        self._log.finish(exit_code=int(failed))


def offline_reason() -> str | None:
    """Return why W&B must keep a run offline; None if it need not."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True, console="off")).settings
    if settings.mode in ("offline", "dryrun"):
        return "WANDB_MODE says so"
    if settings.mode == "disabled":
        return None
    if not has_key():
        return "no API key is configured"
    # Before W&B tries to: its process may wait forever for a server that does not answer.
    return None if is_reachable(settings.base_url) else f"{settings.base_url} cannot be reached"


def has_key() -> bool:
    """Return whether W&B finds credentials; otherwise it would prompt on a terminal."""
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.Error:
        return False  # the configured text does not look like a key


def is_reachable(url: str) -> bool:
    """Return whether a server accepts connections at the address; always True behind a proxy."""
    if getproxies():
        return True
    address = urlsplit(url)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


class TrackioLog:
    """Writes to Trackio's local database, whose run of the same name a resume continues.

    Trackio prints to stdout, asks the Hub for the user's name if it finds a token, and sends metrics to a Space or a
    server that environment variables name: none of that happens here.
    """

    def __init__(self, config: RunConfig, run: Run, step: int, emit: Callback) -> None:
        # By name, so that type checking does not depend on an extra package.
        trackio: Any = import_module("trackio")
        folder = str(trackio.utils.TRACKIO_DIR)
        if not is_writable(folder):  # of which its thread would only warn
            raise OSError(f"{folder} cannot be written to; TRACKIO_DIR names another folder")
        if remote := [name for name in TRACKIO_REMOTES if name in os.environ]:
            emit(WarningEvent(step, f"trackio keeps this run here and ignores {remote[0]}; trackio sync uploads it"))
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._trackio = trackio
        with redirect_stdout(io.StringIO()), _hub_offline(), _without_variables(TRACKIO_REMOTES):
            self._log = trackio.init(
                project=project,
                name=run.name,
                config=config.model_dump(),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        # The steps after the checkpoint, which a resume repeats, would be shown twice.
        self._last_steps = {
            metric: self._last_step(project, run.name, metric, step) for metric in ("train/learning_rate", "val/loss")
        }

    def _last_step(self, project: str, name: str, metric: str, step: int) -> int:
        storage: Any = import_module("trackio.sqlite_storage").SQLiteStorage
        later = storage.get_metric_values(
            project, name, metric, around_step=step + MAX_STEPS, window=MAX_STEPS, run_id=self._log.id
        )
        return max((value["step"] for value in later), default=-1)

    def log(self, metrics: dict[str, float], step: int) -> None:
        if all(step > last for metric, last in self._last_steps.items() if metric in metrics):
            self._log.log(metrics, step=step)

    def close(self, failed: bool) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Context in which `huggingface_hub` opens no connection."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _without_variables(names: Iterable[str]) -> Iterator[None]:
    """Context in which environment variables are not set."""
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


LOGGERS: dict[str, Callable[[RunConfig, Run, int, Callback], Logger]] = {
    "tensorboard": TensorBoardLog,
    "wandb": WandbLog,
    "trackio": TrackioLog,
}
"""By name, which is also that of the required package and of the extra that installs it."""


class FailSafeLogger:
    """A callback that opens a logger at the start event. The logger's first error becomes a warning and drops it.

    Args:
        emit: Receives the warning.
    """

    def __init__(self, name: str, config: RunConfig, run: Run, emit: Callback) -> None:
        self._name = name
        self._config = config
        self._run = run
        self._emit = emit
        self._logger: Logger | None = None
        self._step = 0

    def __call__(self, event: Event) -> None:
        self._step = event.step
        with self._dropped_if_it_fails():
            if isinstance(event, StartEvent):
                self._logger = LOGGERS[self._name](self._config, self._run, event.step, self._emit)
            elif isinstance(event, StepEvent | EvaluationEvent) and self._logger is not None:
                self._logger.log(named_metrics(event, "train/", "val/"), event.step)

    def close(self, failed: bool) -> None:
        with self._dropped_if_it_fails():
            if self._logger is not None:
                self._logger.close(failed)

    @contextmanager
    def _dropped_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._logger = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._emit(WarningEvent(self._step, f"training without {self._name}, which failed: {reason}"))


def check_packages(names: Iterable[str]) -> None:
    """Check before a run is created that the packages of all loggers are installed.

    Raises:
        LumiereError: One is not.
    """
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            problem = f"training.loggers={name} needs the package {name}, which is not installed"
            raise LumiereError(problem, install_command(name)) from None


@contextmanager
def opened_loggers(config: RunConfig, run: Run, callbacks: Sequence[Callback]) -> Iterator[Callback]:
    """Yield a callback for `callbacks` and then the loggers of the config, which are closed at the end."""
    loggers = [
        FailSafeLogger(name, config, run, to_all(callbacks)) for name in LOGGERS if name in config.training.loggers
    ]
    failed = True
    try:
        yield to_all([*callbacks, *loggers])
        failed = False
    finally:
        for logger in loggers:
            logger.close(failed)
