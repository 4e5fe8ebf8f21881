"""Consoles, error reporting and JSON output. Results go to stdout; progress and diagnostics go to stderr."""

import functools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import typer

from lumiere.cli.streams import is_unicode
from lumiere.errors import LumiereError, printable, shortened
from lumiere.persistence.metrics import as_number
from lumiere.programs import program

if TYPE_CHECKING:
    from rich.console import Console

    from lumiere.persistence.loading import OpenedModel


INTERRUPTED = 130
COMMAND = re.compile(r"\blumiere(?= (?:tokenize|train|eval|generate|export|inspect|runs)\b)")

# Rich is imported only where something is drawn with it: `runs ls` and `--version` are to answer at once.


@functools.cache
def stdout() -> "Console":
    """Return the console for results."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@functools.cache
def stderr() -> "Console":
    """Return the console for progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def color_support() -> Literal["many", "few", "none"]:
    """What stdout can show: squares of any colour; 16 colours or none, where characters have to tell; or only text.

    A pipe, a file or a terminal without Unicode gets text, numbers in place of pictures. `NO_COLOR` and `FORCE_COLOR`
    are respected.
    """
    console = stdout()
    if not (console.is_terminal and console.encoding.startswith("utf")):
        return "none"
    return "many" if not console.no_color and console.color_system in ("256", "truecolor") else "few"


def escape(text: str) -> str:
    """`text` with what Rich would read as markup made plain, and what would steer the terminal made visible."""
    from rich.markup import escape as rich_escape

    return rich_escape(printable(text, keep="\n\t"))


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with exit code 2 for what the user can fix, and 130 for Ctrl-C; a bug keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except LumiereError as error:
            print_error(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return run


def print_error(error: LumiereError) -> None:
    stderr().print(f"[bold red]error:[/] {escape(error.message)}")
    if error.hint:
        stderr().print(f"[bold]hint:[/] {escape(as_typed(error.hint))}")


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print `value` as standard JSON; NaN and infinity become null. Escape what stdout's encoding may lack."""
    from lumiere.persistence.metrics import to_json

    sys.stdout.write(to_json(value, indent, ensure_ascii=not is_unicode()) + "\n")


def show_note(text: str) -> None:
    """Print a dim line to stderr."""
    stderr().print(f"[dim]{escape(as_typed(text))}[/]")


def as_typed(text: str) -> str:
    """`text` with each of our commands in it as a shell finds it: by its path, if the environment is not active."""
    return COMMAND.sub(lambda _: program("lumiere"), text)


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


STATUS_STYLES = {
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "failed": "red",
    "crashed": "red",
}


def is_coloured() -> bool:
    """Whether stdout is a terminal whose user wants colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def status_cell(status: str, width: int = 0) -> str:
    """The status in its colour, padded to `width`."""
    cell = text_cell(status).ljust(width)
    return typer.style(cell, fg=STATUS_STYLES[status]) if is_coloured() and status in STATUS_STYLES else cell


def table(rows: Sequence[Sequence[str]], left: frozenset[int] = frozenset({0})) -> str:
    """Rows of cells as lines; the columns of `left` begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines) + "\n"


def text_cell(value: Any, length: int = 60) -> str:
    """A value of the record as short, printable text, or a question mark where it is not known."""
    return "?" if value is None else shortened(printable(str(value)), length)


def number(value: Any, form: str) -> str:
    """A number in `form`, or a dash where it is not known."""
    known = as_number(value)
    return "-" if known is None else format(known, form)


def short_count(value: Any) -> str:
    """`1.19 M`, `850 K`."""
    known = as_number(value)
    if known is None:
        return "-"
    return f"{known / 1e6:.2f} M" if known >= 1e6 else f"{known / 1e3:.0f} K"


def age(created_at: datetime) -> str:
    """`3 min`, `5 h`, `12 d`."""
    minutes = max(0.0, (datetime.now(UTC) - created_at).total_seconds() / 60)
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} d"


LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """One character a value, from the lowest of them to the highest; a flat curve is low. What is no number is a space.

    Args:
        low, high: the ends of the scale, where several curves share one.
    """
    numbers = [value for value in values if math.isfinite(value)]
    low = min(numbers, default=0.0) if low is None else low
    high = max(numbers, default=0.0) if high is None else high
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(LEVELS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def size(num_bytes: int) -> str:
    """`4.8 MB`."""
    return f"{scaled(num_bytes)}B"


def scaled(number: float) -> str:
    """Three digits and the prefix of a unit: `4.76 M`, `157 G`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:  # what three digits round to the next prefix
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def short_time(seconds: float) -> str:
    """`55.7 ms`, `4.4 s`."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def open_model(reference: str, checkpoint: str, device: str, runs_dir: str | None) -> "OpenedModel":
    """Open a checkpoint of a run, with notes and progress on stderr; see `lumiere.persistence.loading.open_model`."""
    from lumiere.cli.progress import CorpusProgress
    from lumiere.persistence import loading

    return loading.open_model(reference, checkpoint, device, runs_dir, show_note, CorpusProgress)
