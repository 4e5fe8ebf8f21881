"""A progress bar on a terminal, lines in a file. Importing this module loads no torch."""

import time
from collections.abc import Callable

from rich.progress import Progress, ProgressColumn

from lumiere.cli.console import stderr

SECONDS_BETWEEN_LINES = 15.0
REFRESHES_PER_SECOND = 2
"""Rich's default of 10 takes time from training."""


class Display(Progress):
    """A progress bar if stderr is a terminal."""

    def __init__(self, *columns: ProgressColumn) -> None:
        super().__init__(
            *columns,
            console=stderr(),
            transient=True,
            disable=not stderr().is_terminal,
            refresh_per_second=REFRESHES_PER_SECOND,
        )
        self._last_line = time.monotonic()

    def print_line(self, line: Callable[[], str]) -> None:
        """Print a line in place of the bar, now and then, if stderr is not a terminal."""
        now = time.monotonic()
        if not stderr().is_terminal and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            stderr().print(line())
