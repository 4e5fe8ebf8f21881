"""Loggers of a training: `metrics.jsonl`, TensorBoard, Weights & Biases. A failing one is dropped with a warning."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from lumiere.config.loader import dump_config, flat_settings
from lumiere.config.schema import RunConfig
from lumiere.errors import LumiereError
from lumiere.persistence.metrics import MetricsWriter
from lumiere.persistence.runs import Run
from lumiere.programs import install_command
from lumiere.training.events import Callback, EvaluationEvent, Event, StartEvent, StepEvent, WarningEvent

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard.writer import SummaryWriter


FOLDER = "tensorboard"


class TensorBoardLog:
    """A callback that writes event files, with the config as text and as hyperparameters.

    After a resume, the steps after the checkpoint are repeated; their first values are purged.
    """

    def __init__(self, config: RunConfig, run: Run, emit: Callback) -> None:
        self._config = config
        self._folder = run.path / FOLDER
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StartEvent):
            self._open(event.step)
        elif isinstance(event, StepEvent | EvaluationEvent) and self._writer is not None:
            for tag, value in tagged(event).items():
                self._writer.add_scalar(tag, value, event.step)
            if isinstance(event, EvaluationEvent):
                self._writer.flush()  # otherwise a kill could take two minutes of it

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        # Values at `step` itself stay, except for a run that was killed before it saved anything.
        is_new = not self._folder.exists()
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else 0)
        if not is_new:
            return
        self._writer.add_text("config", f"```yaml\n{dump_config(self._config)}```", 0)
        kinds = (bool, int, float, str)
        settings = {
            path: value if isinstance(value, kinds) else str(value)
            for path, value in flat_settings(self._config).items()
            if value is not None
        }
        # By hand, because `add_hparams` would open a second run under the first.
        for summary in hparams(settings, {"val/loss": 0.0, "train/loss": 0.0}):
            self._writer._get_file_writer().add_summary(summary, 0)
        self._writer.flush()


PROJECT = "lumiere"
CONNECT_SECONDS = 20
"""How long to wait for the server at the start."""
FINISH_SECONDS = 60
"""How long to wait at the end for what is not yet uploaded; it stays in the folder, to be synced by hand."""


class WandbLog:
    """A callback that writes a W&B run of the same id, which a resume continues."""

    def __init__(self, config: RunConfig, run: Run, emit: Callback) -> None:
        self._config = config
        self._run = run
        self._emit = emit
        self._log: wandb.Run | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StartEvent):
            self._open(event.step)
        elif isinstance(event, StepEvent | EvaluationEvent) and self._log is not None:
            # The two of one step are merged; steps that come again after a resume are left out by W&B.
            self._log.log(tagged(event), step=event.step)

    def close(self, failed: bool) -> None:
        if self._log is not None:
            self._log.finish(exit_code=int(failed))

    def _open(self, step: int) -> None:
        import wandb

        settings = wandb.setup(wandb.Settings(silent=True, console="off")).settings
        reason = None
        if settings.mode in ("offline", "dryrun"):
            reason = "WANDB_MODE says so"
        elif settings.mode != "disabled" and not has_key():
            reason = "no API key is configured"
        # Before W&B tries to: its process may wait forever for a server that does not answer.
        elif settings.mode != "disabled" and not is_reachable(settings.base_url):
            reason = f"{settings.base_url} cannot be reached"
        if reason is not None:
            path = self._run.path / "wandb"
            how = f"wandb sync {path}/offline-run-*-{self._run.id}"
            self._emit(WarningEvent(step, f"wandb keeps this run offline, because {reason}; upload it with {how}"))
        self._log = self._init(None if reason is None else "offline")

    def _init(self, mode: Any) -> "wandb.Run":
        import wandb

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


def tagged(event: StepEvent | EvaluationEvent) -> dict[str, float]:
    """Return the metrics of an event by the tag that the loggers use."""
    if isinstance(event, StepEvent):
        return {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/tokens_per_second": event.tokens_per_second,
            "train/mfu": event.mfu,
        }
    return {
        "val/loss": event.evaluation.loss,
        "val/perplexity": event.evaluation.perplexity,
        "val/bits_per_byte": event.evaluation.bits_per_byte,
    }


class MetricsLog:
    """A callback that writes `metrics.jsonl`; docs/metrics.md has its names and units."""

    def __init__(self, writer: MetricsWriter) -> None:
        self._writer = writer

    def __call__(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._writer.write(
                    progress(event)
                    | {
                        "loss": event.loss,
                        "learning_rate": event.learning_rate,
                        "grad_norm": event.grad_norm,
                        "tokens_per_second": round(event.tokens_per_second, 1),
                        "mfu": round(event.mfu, 4),
                    }
                )
            case EvaluationEvent(evaluation=evaluation):
                self._writer.write(
                    progress(event)
                    | {
                        "val_loss": evaluation.loss,
                        "val_perplexity": evaluation.perplexity,
                        "val_bits_per_byte": evaluation.bits_per_byte,
                    }
                )
            case _:
                pass


def progress(event: StepEvent | EvaluationEvent) -> dict[str, Any]:
    """Return the keys that every line has."""
    return {
        "step": event.step,
        "epoch": round(event.epoch, 6),
        "tokens": event.tokens,
        "time": round(event.seconds, 3),
    }


class Logger(Protocol):
    """A callback that opens a resource at the `StartEvent`. It may raise any exception."""

    def __call__(self, event: Event) -> None: ...

    def close(self, failed: bool) -> None:
        """Write what is left; `failed` means that training ended with an error."""
        ...


LOGGERS: dict[str, Callable[[RunConfig, Run, Callback], Logger]] = {"tensorboard": TensorBoardLog, "wandb": WandbLog}
"""By name, which is also that of the required package and of the extra that installs it."""


class FailSafeLogger:
    """A logger whose first error becomes a `WarningEvent`, after which it is dropped.

    Args:
        emit: Receives the warning.
    """

    def __init__(self, name: str, logger: Logger, emit: Callback) -> None:
        self._name = name
        self._logger: Logger | None = logger
        self._emit = emit
        self._step = 0

    def __call__(self, event: Event) -> None:
        self._step = event.step
        if self._logger is not None:
            self._attempt(self._logger, lambda logger: logger(event))

    def close(self, failed: bool) -> None:
        if self._logger is not None:
            self._attempt(self._logger, lambda logger: logger.close(failed))

    def _attempt(self, logger: Logger, act: Callable[[Logger], None]) -> None:
        try:
            act(logger)
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
            raise LumiereError(
                f"training.loggers={name} needs the package {name}, which is not installed",
                install_command(name),
            ) from None


@contextmanager
def opened_loggers(config: RunConfig, run: Run, callbacks: Sequence[Callback]) -> Iterator[list[Callback]]:
    """Yield `callbacks` and the loggers of the config, which are closed at the end."""

    def emit(event: Event) -> None:
        for callback in callbacks:
            callback(event)

    wanted = [name for name in LOGGERS if name in config.training.loggers]
    loggers = [FailSafeLogger(name, LOGGERS[name](config, run, emit), emit) for name in wanted]
    failed = True
    try:
        yield [*callbacks, *loggers]
        failed = False
    finally:
        for logger in loggers:
            logger.close(failed)
