"""`lumiere runs ls`."""

import sys
from dataclasses import fields
from typing import Annotated, Any

from typer import Option

from lumiere.cli.console import (
    LEVELS,
    STATUS_STYLES,
    age,
    number,
    print_json,
    short_count,
    show_note,
    sparkline,
    table,
    text_cell,
)
from lumiere.cli.options import Json, RunsDir
from lumiere.persistence.catalog import Entry, list_runs
from lumiere.persistence.metrics import sample_losses
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import RunStore

CURVE_WIDTH = 8
HEADINGS = ["id", "status", "parameters", "steps", "best loss", "curve", "age", "corpus", ""]
LEFT = {0, 1, 5, 7, 8}

# JSON output has each of these keys, null where a run lacks it.
RECORD_KEYS = ("name", *(field.name for field in fields(RunRecord) if field.name != "values"))


def list_all(
    statuses: Annotated[
        list[str] | None,
        Option(
            "--status",
            metavar="STATUS",
            help="List runs that are running, finished, interrupted, failed, crashed, imported or unknown. Repeatable.",
        ),
    ] = None,
    tags: Annotated[
        list[str] | None, Option("--tag", metavar="TAG", help="List runs with this tag. Repeat it to require several.")
    ] = None,
    sort: Annotated[
        str,
        Option(
            metavar="ORDER",
            help="Sort by age (newest first), loss (lowest first), steps, parameters (most first) or name (a to z). "
            "Unknown values come last.",
        ),
    ] = "age",
    limit: Annotated[int | None, Option("--limit", "-n", metavar="N", help="List at most N runs.")] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """List the runs, newest first, each with a sparkline of its training loss.

    Example: [bold]lumiere runs ls --status finished --sort loss[/]
    """
    store = RunStore(runs_dir)
    entries = list_runs(store, statuses or (), tags or (), sort, limit)
    if as_json:
        print_json([facts(entry) for entry in entries])
    elif entries:
        # Without Rich, which takes a second for a thousand runs.
        sys.stdout.write(table([HEADINGS, *map(cells, entries)], LEFT, {1: STATUS_STYLES}))
    elif statuses or tags:
        show_note(f"no matching runs in {store.runs_dir}; lumiere runs ls lists all")
    else:
        show_note(f"no runs in {store.runs_dir}; train one: lumiere train tiny")


def cells(entry: Entry) -> list[str]:
    """Return the cells of a run."""
    return [
        entry.run.id,
        text_cell(entry.status, 11),
        short_count(entry.record.num_parameters),
        number(entry.record.step, ",.0f"),
        number(entry.record.best_loss, ".4f"),
        curve(entry),
        age(entry.run.created_at),
        text_cell(entry.record.dataset),
        " ".join(f"#{tag}" for tag in entry.notes.tags),
    ]


def curve(entry: Entry) -> str:
    """Return a sparkline of the training loss; empty if stdout cannot encode it."""
    try:
        LEVELS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ""
    return sparkline(sample_losses(entry.run.metrics_path, CURVE_WIDTH))


def facts(entry: Entry) -> dict[str, Any]:
    """Return a run's record and identity as JSON values."""
    run = entry.run
    names = {"run": run.name, "id": run.id, "path": str(run.path)}
    record = dict.fromkeys(RECORD_KEYS) | entry.record.to_json()
    return names | record | names | {"status": entry.status, "tags": list(entry.notes.tags), "note": entry.notes.text}
