"""How the facts about a run are written, in words and in JSON. Loads no Rich: `runs ls` is to answer at once."""

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import typer

from lumiere.errors import printable, shortened
from lumiere.persistence.catalog import Entry
from lumiere.persistence.metrics import as_number

STATUS_STYLES = {
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "failed": "red",
    "crashed": "red",
}


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


def facts(entry: Entry) -> dict[str, Any]:
    """What a script wants to know of a run: its record, and what is not in it."""
    run = entry.run
    names = {"run": run.name, "id": run.id, "path": str(run.path)}
    record = dict.fromkeys(RECORD_KEYS) | entry.record
    return names | record | names | {"status": entry.status, "tags": list(entry.notes.tags), "note": entry.notes.text}


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
