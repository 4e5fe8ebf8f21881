"""`lumiere runs ls`."""

import sys
from typing import Annotated, Any, Optional

import typer

from lumiere.cli.console import (
    LEVELS,
    age,
    number,
    print_json,
    short_count,
    show_note,
    sparkline,
    status_cell,
    text_cell,
)
from lumiere.cli.options import Json, RunsDir
from lumiere.persistence.catalog import Entry, list_runs
from lumiere.persistence.metrics import sample_losses
from lumiere.persistence.runs import RunStore

CURVE_WIDTH = 8
HEADINGS = ("id", "status", "parameters", "steps", "best loss", "curve", "age", "corpus")
LEFT = (True, True, False, False, False, True, False, True)

# What a training writes into the record. A script finds each of them, null where a run does not have it (yet).
RECORD_KEYS = (
    *("name", "created_at", "command", "device", "precision", "num_parameters", "total_steps", "dataset"),
    *("corpus_sha256", "step", "epoch", "tokens", "training_seconds", "best_loss", "best_step", "skipped_steps"),
    *(
        "splits",
        "best_evaluation",
        "resumes",
        "stop_reason",
        "error",
        "pid",
        "host",
        "boot_id",
        "peak_flops",
        "world_size",
    ),
    *("job", "versions", "commit", "machine"),
)


def list_all(
    statuses: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--status",
            metavar="STATUS",
            help="Only runs that are running, finished, interrupted, failed, crashed or unknown. Repeatable.",
        ),
    ] = None,
    tags: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--tag", metavar="TAG", help="Only runs with this tag. Repeatable: with all of them."),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(
            "--sort",
            metavar="ORDER",
            help="age (newest first), loss (lowest first), steps, parameters (most first) or name (a to z). "
            "What is not known comes last.",
        ),
    ] = "age",
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--limit", "-n", metavar="N", help="At most so many, after sorting."),
    ] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """List the runs, newest first, each with the curve of its training loss from the first step to the last."""
    store = RunStore(runs_dir)
    entries = list_runs(store, statuses or (), tags or (), sort, limit)
    if as_json:
        print_json([facts(entry) for entry in entries])
    elif entries:
        sys.stdout.write(listing(entries))
    elif statuses or tags:
        show_note(f"no such runs in {store.runs_dir}; lumiere runs ls lists all")
    else:
        show_note(f"no runs in {store.runs_dir}; train one: lumiere train tiny")


def listing(entries: list[Entry]) -> str:
    """The table. By hand and without markup: a library that measures cells takes a second for a thousand runs."""
    rows = [cells(entry) for entry in entries]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    lines = [line(HEADINGS, widths)]
    for entry, row in zip(entries, rows, strict=True):
        tags = "  " + " ".join(f"#{tag}" for tag in entry.notes.tags) if entry.notes.tags else ""
        lines.append(line(row, widths) + tags)
    return "\n".join(lines) + "\n"


def line(row: tuple[str, ...], widths: list[int]) -> str:
    padded = [
        cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(row, widths, LEFT, strict=True)
    ]
    padded[1] = status_cell(row[1], widths[1])
    return "  ".join(padded).rstrip()


def cells(entry: Entry) -> tuple[str, ...]:
    """Those of one run, without its tags."""
    return (
        entry.run.id,
        text_cell(entry.status, 11),
        short_count(entry.record.num_parameters),
        number(entry.record.step, ",.0f"),
        number(entry.record.best_loss, ".4f"),
        curve(entry),
        age(entry.run.created_at),
        text_cell(entry.record.dataset),
    )


def curve(entry: Entry) -> str:
    """The training loss, or nothing where stdout has no characters for it."""
    try:
        LEVELS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ""
    return sparkline(sample_losses(entry.run.metrics_path, CURVE_WIDTH))


def facts(entry: Entry) -> dict[str, Any]:
    """What a script wants to know of a run: its record, and what is not in it."""
    run = entry.run
    names = {"run": run.name, "id": run.id, "path": str(run.path)}
    record = dict.fromkeys(RECORD_KEYS) | entry.record.to_json()
    return names | record | names | {"status": entry.status, "tags": list(entry.notes.tags), "note": entry.notes.text}
