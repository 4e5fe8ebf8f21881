"""`lumiere runs tag` and `lumiere runs note`."""

import sys
from typing import Annotated

import typer

from lumiere.cli.console import print_json
from lumiere.cli.options import Json, RunReference, RunsDir
from lumiere.errors import printable
from lumiere.persistence.notes import Notes, add_tags, remove_tags, write_note
from lumiere.persistence.runs import Run, RunStore


def tag_run(
    run: RunReference,
    tags: Annotated[list[str], typer.Argument(metavar="TAG...", help="Letters, digits, dots, hyphens, underscores.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the tags away.")] = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Give a run tags, which [bold]lumiere runs ls --tag TAG[/] finds; or take them away."""
    opened = RunStore(runs_dir).open(run)
    show(opened, remove_tags(opened, tags) if remove else add_tags(opened, tags), as_json)


def note_run(
    run: RunReference,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to remember; an empty text removes the note.")],
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Write down what you want to remember of a run; [bold]lumiere runs show RUN[/] shows it."""
    opened = RunStore(runs_dir).open(run)
    show(opened, write_note(opened, text), as_json)


def show(run: Run, notes: Notes, as_json: bool) -> None:
    if as_json:
        print_json({"run": run.name, "tags": list(notes.tags), "note": notes.text})
        return
    sys.stdout.write(
        f"{run.name}\n  tags  {' '.join(notes.tags) or 'none'}\n  note  {printable(notes.text) or 'none'}\n"
    )
