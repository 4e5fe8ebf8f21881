"""Consoles, error reporting and JSON output. Results go to stdout; progress and diagnostics go to stderr."""

import functools
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import typer

from lumiere.cli.streams import is_unicode
from lumiere.errors import LumiereError, printable, shortened
from lumiere.persistence.metrics import as_number, to_json
from lumiere.programs import program

if TYPE_CHECKING:
    from rich.console import Console

CHECK_FAILED = 3
COMMAND = re.compile(r"\blumiere(?= (?:tokenize|train|eval|generate|export|inspect|runs)\b)")

# Rich is imported where it is used, so that `runs ls` and `--version` start fast.


@functools.cache
def stdout() -> "Console":
    """Return the console for results."""
    from rich.console import Console

    return Console(emoji=False, highlight=False, soft_wrap=True)


@functools.cache
def stderr() -> "Console":
    """Return the console for progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, emoji=False, highlight=False, soft_wrap=True)


def color_support() -> Literal["many", "few", "none"]:
    """Return what stdout can show: `many` colors, `few` (16 or none: shades must be characters), or `none` (text only).

    Pipes, files and terminals without Unicode get text. `NO_COLOR` and `FORCE_COLOR` are respected.
    """
    console = stdout()
    if not (console.is_terminal and console.encoding.startswith("utf")):
        return "none"
    return "many" if not console.no_color and console.color_system in ("256", "truecolor") else "few"


def escape(text: str) -> str:
    """Escape Rich markup, and make control characters visible."""
    from rich.markup import escape as rich_escape

    return rich_escape(printable(text, keep="\n\t"))


def print_error(error: LumiereError) -> None:
    stderr().print(f"[bold red]error:[/] {escape(error.message)}")
    if error.hint:
        stderr().print(f"[bold]hint:[/] {escape(as_typed(error.hint))}")


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print `value` as standard JSON: NaN and infinity as null, non-ASCII escaped unless stdout is Unicode."""
    sys.stdout.write(to_json(value, indent, ensure_ascii=not is_unicode()) + "\n")


def show_note(text: str) -> None:
    """Print a dim line to stderr."""
    stderr().print(f"[dim]{escape(as_typed(text))}[/]")


def show_warning(message: str) -> None:
    """Print a warning to stderr."""
    stderr().print(f"[bold yellow]warning:[/] {escape(message)}")


def as_typed(text: str) -> str:
    """Replace `lumiere` in commands by its path if the Python environment is not active."""
    return COMMAND.sub(lambda _: program("lumiere"), text)


def duration(seconds: float) -> str:
    """Format seconds as `1:02:03`, or `2:03` under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


STATUS_STYLES = {
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "failed": "red",
    "crashed": "red",
    "imported": "blue",
}


def is_colored() -> bool:
    """Return whether stdout is a terminal whose user wants colors."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def table(
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
    colors: Mapping[int, Mapping[str, str]] = MappingProxyType({}),
) -> str:
    """Format rows as an aligned table.

    Args:
        left: Columns that are left-aligned.
        colors: Colors of cells, by column and text.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def padded(column: int, cell: str) -> str:
        text = cell.ljust(widths[column]) if column in left else cell.rjust(widths[column])
        color = colors.get(column, {}).get(cell)
        return typer.style(text, fg=color) if color and is_colored() else text

    lines = ("  ".join(padded(column, cell) for column, cell in enumerate(row)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def text_cell(value: Any, length: int = 60) -> str:
    """Format a recorded value as short, printable text; `?` if unknown."""
    return "?" if value is None else shortened(printable(str(value)), length)


def setting(value: Any) -> str:
    """Format a setting as JSON; single words without quotes."""
    return printable(value if isinstance(value, str) and value and " " not in value else to_json(value))


def number(value: Any, form: str) -> str:
    """Format a number; `-` if unknown."""
    known = as_number(value)
    return "-" if known is None else format(known, form)


def short_count(value: Any) -> str:
    """Format a count as `1.19 M` or `850 k`; `-` if unknown."""
    known = as_number(value)
    return "-" if known is None else scaled(known).rstrip()


def age(created_at: datetime) -> str:
    """Format the time since `created_at` as `3 min`, `5 h` or `12 d`."""
    minutes = max(0.0, (datetime.now(UTC) - created_at).total_seconds() / 60)
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} d"


LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """Draw one character per value; NaN and infinity are spaces, a constant curve is at the bottom.

    Args:
        low, high: Ends of the scale. Default: the extremes of `values`.
    """
    numbers = [value for value in values if math.isfinite(value)]
    low = min(numbers, default=0.0) if low is None else low
    high = max(numbers, default=0.0) if high is None else high
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(LEVELS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def size(num_bytes: int) -> str:
    """Format a number of bytes as `4.8 MB`."""
    return f"{scaled(num_bytes)}B"


def scaled(number: float) -> str:
    """Format with three digits and an SI prefix: `4.76 M`, `157 G`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:  # rounds up to the next prefix
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def short_time(seconds: float) -> str:
    """Format seconds as `55.7 ms` or `4.4 s`."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
