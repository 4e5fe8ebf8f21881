"""`lumiere runs rm`."""

import sys

from lumiere.cli.console import print_json
from lumiere.cli.options import Json, RunReferences, RunsDir
from lumiere.cli.plan import size
from lumiere.cli.runs.cells import age, number
from lumiere.cli.runs.confirm import DryRun, Yes, check_answerable, confirm
from lumiere.errors import printable
from lumiere.persistence.catalog import (
    Entry,
    check_removable,
    disk_bytes,
    distinct,
    read_entry,
    remove_leftovers,
    remove_run,
)
from lumiere.persistence.runs import RunStore


def remove_runs(
    runs: RunReferences,
    yes: Yes = False,
    dry_run: DryRun = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Delete runs, with all that is in their folders; asks before anything goes. A running one is refused."""
    store = RunStore(runs_dir)
    chosen = distinct([store.open(reference) for reference in runs])
    for run in chosen:
        check_removable(run)
    check_answerable(yes, dry_run)
    sizes = {run: disk_bytes(run.path) for run in chosen}
    total = sum(sizes.values())
    for run in chosen:
        sys.stderr.write(f"{describe(read_entry(run), sizes[run])}\n")
    what = f"{len(chosen)} run{'s' * (len(chosen) > 1)}, {size(total)}"
    if not dry_run:
        if not yes:
            confirm(f"Delete {what}?")
        remove_leftovers(store)
        for run in chosen:
            remove_run(run)
    if as_json:
        print_json({"runs": [run.name for run in chosen], "num_bytes": total, "dry_run": dry_run})
    else:
        sys.stdout.write(f"{'would delete' if dry_run else 'deleted'} {what}\n")


def describe(entry: Entry, num_bytes: int) -> str:
    """A run in one line, so that nobody deletes the wrong one."""
    loss = f"best loss {number(entry.record.get('best_loss'), '.4f')}"
    tags = "".join(f"  #{tag}" for tag in entry.notes.tags)
    return f"{entry.run.name}  {printable(entry.status)}  {loss}  {age(entry.run.created_at)}  {size(num_bytes)}{tags}"
