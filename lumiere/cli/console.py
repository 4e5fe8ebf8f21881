"""Consoles, error reporting and JSON output. Results go to stdout; progress and diagnostics go to stderr."""

import functools
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import typer

from lumiere.cli.streams import is_unicode
from lumiere.errors import LumiereError, printable
from lumiere.programs import program

if TYPE_CHECKING:
    from rich.console import Console

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
