"""The question before anything is deleted."""

import sys
from typing import Annotated

import typer

from lumiere.errors import LumiereError

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, for scripts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave everything as it is.")]


def check_answerable(yes: bool, dry_run: bool) -> None:
    """Refuse to begin where a question would be asked and nobody is there to answer it."""
    if not (yes or dry_run or is_interactive()):
        raise LumiereError("nobody is there to ask whether to delete", "give --yes; --dry-run shows what would go")


def confirm(question: str) -> None:
    """Ask.

    Raises:
        typer.Exit: if the answer is no.
    """
    # Not `typer.confirm`, which writes to stdout, where the answer of the command belongs.
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if answer.strip().lower() not in ("y", "yes"):
        sys.stderr.write("nothing was deleted\n")
        raise typer.Exit(1)


def is_interactive() -> bool:
    return sys.stdin.isatty()
