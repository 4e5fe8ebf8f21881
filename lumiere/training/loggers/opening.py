"""The optional loggers of a training, by name. None of them may end it: one that fails is told of once and left out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from typing import Protocol

from lumiere.config.schema import RunConfig
from lumiere.errors import LumiereError
from lumiere.persistence.runs import Run
from lumiere.programs import install_command
from lumiere.training.events import Event, Listener, WarningEvent
from lumiere.training.loggers.tensorboard import TensorBoardLog
from lumiere.training.loggers.wandb import WandbLog


class Logger(Protocol):
    """A listener that keeps something open. It opens it at the `StartEvent`, and may raise whatever it likes."""

    def __call__(self, event: Event) -> None: ...

    def close(self, failed: bool) -> None:
        """Write what is left; `failed` says that the training ended with an error."""
        ...


LOGGERS: dict[str, Callable[[RunConfig, Run, Listener], Logger]] = {"tensorboard": TensorBoardLog, "wandb": WandbLog}
"""By name, which is the name of the package that it needs and of the extra that installs it."""


class Forgiving:
    """A logger whose first error becomes a `WarningEvent`, and which is then silent.

    Args:
        tell: takes the warning.
    """

    def __init__(self, name: str, logger: Logger, tell: Listener) -> None:
        self._name = name
        self._logger: Logger | None = logger
        self._tell = tell
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
            self._tell(WarningEvent(self._step, f"training goes on without {self._name}, which failed: {reason}"))


def check_packages(names: Iterable[str]) -> None:
    """Find out before a run is made whether all loggers are installed.

    Raises:
        LumiereError: if one is not.
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
def opened_loggers(config: RunConfig, run: Run, listeners: Sequence[Listener]) -> Iterator[list[Listener]]:
    """`listeners`, and after them the loggers that the config asks for, which are closed at the end."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    wanted = [name for name in LOGGERS if name in config.training.loggers]
    loggers = [Forgiving(name, LOGGERS[name](config, run, tell), tell) for name in wanted]
    failed = True
    try:
        yield [*listeners, *loggers]
        failed = False
    finally:
        for logger in loggers:
            logger.close(failed)
