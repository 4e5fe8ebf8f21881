"""Which runs are listed, and in which order. Reads two small files a run, and nothing of its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from lumiere.errors import LumiereError, nearest
from lumiere.persistence.metrics import as_number
from lumiere.persistence.notes import Notes, check_tag, read_notes
from lumiere.persistence.runs import Run, RunStore

STATUSES = ("running", "finished", "interrupted", "failed", "crashed", "unknown")


@dataclass(frozen=True)
class Entry:
    """A run with what its small files say: status, record and notes."""

    run: Run
    status: str
    record: dict[str, Any]
    notes: Notes

    def number(self, key: str) -> int | float | None:
        """A number of the record; None where it has none."""
        return as_number(self.record.get(key))


def read_entry(run: Run) -> Entry:
    """What the small files of a run say."""
    record = run.record
    # Only a run that is recorded as running can really be something else; for the others one reading is enough.
    status = run.status if record["status"] == "running" else str(record["status"])
    return Entry(run, status, record, read_notes(run))


def _ascending(key: str) -> Callable[[Entry], float]:
    return lambda entry: math.inf if (value := entry.number(key)) is None else value


def _descending(key: str) -> Callable[[Entry], float]:
    return lambda entry: math.inf if (value := entry.number(key)) is None else -value


# Unknown values are infinite, and come last in either order. `age` is the order of the store.
SORTS: dict[str, Callable[[Entry], Any]] = {
    "age": lambda entry: 0,
    "loss": _ascending("best_loss"),
    "steps": _descending("step"),
    "parameters": _descending("num_parameters"),
    "name": lambda entry: entry.run.name,
}


def list_runs(
    store: RunStore,
    statuses: Collection[str] = (),
    tags: Collection[str] = (),
    sort: str = "age",
    limit: int | None = None,
) -> list[Entry]:
    """The runs of a store.

    Args:
        statuses: those that are wanted; none stands for all.
        tags: those that a run must have, all of them.
        sort: `age` (newest first), `loss` (lowest best validation loss first), `steps`, `parameters` (most first) or
            `name`. Runs that are equal are newest first; those whose value is not known come last.
        limit: the most runs, after sorting.

    Raises:
        LumiereError: there is no such status or order, a tag is none, or the limit is less than 1.
    """
    for status in statuses:
        _check_word("status", status, STATUSES)
    for tag in tags:
        check_tag(tag)
    _check_word("order", sort, SORTS)
    if limit is not None and limit < 1:
        raise LumiereError(f"the limit must be at least 1, not {limit}", "leave --limit out to list all runs")
    entries = map(read_entry, store.all())
    wanted = [
        entry for entry in entries if (not statuses or entry.status in statuses) and set(tags) <= set(entry.notes.tags)
    ]
    return sorted(wanted, key=SORTS[sort])[:limit]


def _check_word(kind: str, word: str, words: Collection[str]) -> None:
    if word not in words:
        guess = nearest(word, words)
        hint = f"did you mean {guess}?" if guess else f"one of {', '.join(words)}"
        raise LumiereError(f"there is no {kind} {word!a}", hint)
