"""`lumiere runs prune`."""

import sys
from typing import Annotated, Optional

import typer

from lumiere.cli.console import print_json
from lumiere.cli.options import Json, RunsDir
from lumiere.cli.plan import size
from lumiere.cli.runs.confirm import DryRun, Yes, check_answerable, confirm
from lumiere.persistence.catalog import Pruning, distinct, parse_keep, plan_pruning, prune
from lumiere.persistence.runs import RunStore


def prune_runs(
    runs: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[RUN...]", help="Names, ids or the start of them, or latest. \\[default: all]"),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep", metavar="NAMES", help="What stays: best, latest, previous, snapshots, or steps, with commas."
        ),
    ] = "best,latest",
    yes: Yes = False,
    dry_run: DryRun = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Delete the checkpoints of finished runs, all but those that are kept; asks before anything goes.

    Config, metrics and tokenizer stay. Other runs are left alone: one that was interrupted needs its checkpoints to go
    on. So is a run that has none of those that are kept.

    Examples: [bold]--keep best[/] to generate and inspect, [bold]--keep best,snapshots[/] to see it learn as well.
    """
    store = RunStore(runs_dir)
    names = parse_keep(keep)
    chosen = distinct([store.open(reference) for reference in runs]) if runs else store.all()
    check_answerable(yes, dry_run)
    plans = [plan_pruning(run, names) for run in chosen]
    for plan in plans:
        if line := describe(plan):
            sys.stderr.write(f"{line}\n")
    plans = [plan for plan in plans if plan.names]
    count, total = sum(len(plan.names) for plan in plans), sum(plan.num_bytes for plan in plans)
    what = f"{count:,} checkpoint{'s' * (count != 1)} of {len(plans):,} run{'s' * (len(plans) != 1)}, {size(total)}"
    if plans and not dry_run:
        if not yes:
            confirm(f"Delete {what}?")
        for plan in plans:
            prune(plan)
    if as_json:
        pruned = [{"run": plan.run.name, "checkpoints": plan.names, "num_bytes": plan.num_bytes} for plan in plans]
        print_json({"runs": pruned, "num_bytes": total, "dry_run": dry_run})
    elif not plans:
        sys.stdout.write("nothing to delete\n")
    else:
        sys.stdout.write(f"{'would delete' if dry_run else 'deleted'} {what}\n")


def describe(plan: Pruning) -> str | None:
    """What becomes of a run; None where there is nothing to say."""
    if plan.reason is not None:
        return f"{plan.run.name}  left alone: {plan.reason}"
    if not plan.names:
        return None
    shown = ", ".join(plan.names[:4]) + (f" and {len(plan.names) - 4} more" if len(plan.names) > 4 else "")
    return f"{plan.run.name}  {shown}  {size(plan.num_bytes)}"
