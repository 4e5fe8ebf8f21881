"""`lumiere runs tag`, `note`, `rm` and `prune`: commands that change the runs directory."""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, Any

from typer import Argument, Exit, Option

from lumiere.cli.console import age, number, print_json, size
from lumiere.cli.options import Json, RunReference, RunReferences, RunsDir
from lumiere.errors import LumiereError, printable
from lumiere.persistence.catalog import (
    Entry,
    Pruning,
    check_removable,
    disk_bytes,
    parse_keep,
    plan_pruning,
    prune,
    read_entry,
    remove_leftovers,
    remove_run,
)
from lumiere.persistence.notes import Notes, add_tags, remove_tags, write_note
from lumiere.persistence.runs import Run, RunStore

Yes = Annotated[bool, Option("--yes", "-y", help="Delete without asking.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show what would be deleted, and delete nothing.")]


def tag_run(
    run: RunReference,
    tags: Annotated[list[str], Argument(metavar="TAG...", help="Letters, digits, dots, hyphens, underscores.")],
    remove: Annotated[bool, Option("--remove", help="Remove the tags.")] = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Add tags to a run, or remove them; [bold]lumiere runs ls --tag TAG[/] finds them.

    Example: [bold]lumiere runs tag latest baseline[/]
    """
    opened = RunStore(runs_dir).open(run)
    show_labels(opened, remove_tags(opened, tags) if remove else add_tags(opened, tags), as_json)


def note_run(
    run: RunReference,
    text: Annotated[str, Argument(metavar="TEXT", help="The note; an empty text removes it.")],
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Attach a note to a run; [bold]lumiere runs show RUN[/] shows it.

    Example: [bold]lumiere runs note latest "first run with dropout"[/]
    """
    opened = RunStore(runs_dir).open(run)
    show_labels(opened, write_note(opened, text), as_json)


def show_labels(run: Run, notes: Notes, as_json: bool) -> None:
    if as_json:
        print_json({"run": run.name, "tags": list(notes.tags), "note": notes.text})
        return
    sys.stdout.write(
        f"{run.name}\n  tags  {' '.join(notes.tags) or 'none'}\n  note  {printable(notes.text) or 'none'}\n"
    )


def remove_runs(
    runs: RunReferences, yes: Yes = False, dry_run: DryRun = False, runs_dir: RunsDir = None, as_json: Json = False
) -> None:
    """Delete runs and everything in their folders, after a confirmation. Running runs are refused.

    Example: [bold]lumiere runs rm 3ka5 --dry-run[/]
    """
    store = RunStore(runs_dir)
    chosen = store.open_all(runs)
    for run in chosen:
        check_removable(run)
    sizes = {run: disk_bytes(run.path) for run in chosen}
    delete(
        f"{len(chosen)} run{'s' * (len(chosen) > 1)}, {size(sum(sizes.values()))}",
        (describe_run(read_entry(run), num_bytes) for run, num_bytes in sizes.items()),
        [partial(remove_leftovers, store), *(partial(remove_run, run) for run in chosen)],
        {"runs": [run.name for run in chosen], "num_bytes": sum(sizes.values())},
        (yes, dry_run, as_json),
    )


def describe_run(entry: Entry, num_bytes: int) -> str:
    """Describe a run in one line, to recognize it before deleting it."""
    loss = f"best loss {number(entry.record.best_loss, '.4f')}"
    tags = "".join(f"  #{tag}" for tag in entry.notes.tags)
    return f"{entry.run.name}  {printable(entry.status)}  {loss}  {age(entry.run.created_at)}  {size(num_bytes)}{tags}"


def prune_runs(
    runs: Annotated[
        list[str] | None,
        Argument(metavar="[RUN...]", help="Names, ids, unique starts of ids, or latest. \\[default: all]"),
    ] = None,
    keep: Annotated[
        str, Option(metavar="NAMES", help="Comma-separated: best, latest, previous, snapshots, or steps.")
    ] = "best,latest",
    yes: Yes = False,
    dry_run: DryRun = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Delete checkpoints of finished runs except those to keep, after a confirmation.

    Config, metrics and tokenizer stay. Unfinished runs, which need their checkpoints to resume, and runs without any
    checkpoint to keep are skipped.

    Examples: [bold]lumiere runs prune --keep best[/] keeps what generating and inspecting need;
    [bold]lumiere runs prune --keep best,snapshots[/] also keeps the training dynamics.
    """
    store = RunStore(runs_dir)
    names = parse_keep(keep)
    chosen = store.open_all(runs) if runs else store.all()
    plans = [plan_pruning(run, names) for run in chosen]
    lines = [line for plan in plans if (line := describe_pruning(plan))]
    plans = [plan for plan in plans if plan.names]
    count, total = sum(len(plan.names) for plan in plans), sum(plan.num_bytes for plan in plans)
    pruned = [{"run": plan.run.name, "checkpoints": plan.names, "num_bytes": plan.num_bytes} for plan in plans]
    delete(
        f"{count:,} checkpoint{'s' * (count != 1)} of {len(plans):,} run{'s' * (len(plans) != 1)}, {size(total)}",
        lines,
        [partial(prune, plan) for plan in plans],
        {"runs": pruned, "num_bytes": total},
        (yes, dry_run, as_json),
    )


def describe_pruning(plan: Pruning) -> str | None:
    """Describe what is deleted of a run; None if nothing is."""
    if plan.reason is not None:
        return f"{plan.run.name}  skipped: {plan.reason}"
    if not plan.names:
        return None
    shown = ", ".join(plan.names[:4]) + (f" and {len(plan.names) - 4} more" if len(plan.names) > 4 else "")
    return f"{plan.run.name}  {shown}  {size(plan.num_bytes)}"


def delete(
    what: str,
    lines: Iterable[str],
    deletions: Sequence[Callable[[], None]],
    values: dict[str, Any],
    options: tuple[bool, bool, bool],
) -> None:
    """Show what would be deleted on stderr, ask, delete, and report; exit with 1 unless the answer is yes.

    Args:
        what: What is deleted, in words.
        lines: Descriptions of its parts.
        values: What `--json` prints.
        options: `--yes`, `--dry-run` and `--json`.

    Raises:
        LumiereError: A confirmation is needed, and stdin is not a terminal.
    """
    yes, dry_run, as_json = options
    if not (yes or dry_run or is_interactive()):
        hint = "delete without asking with --yes, or preview with --dry-run"
        raise LumiereError("stdin is not a terminal, so nobody can confirm", hint)
    sys.stderr.writelines(f"{line}\n" for line in lines)
    if deletions and not (yes or dry_run):
        sys.stderr.write(f"Delete {what}? [y/N] ")  # `typer.confirm` would ask on stdout
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            sys.stderr.write("nothing was deleted\n")
            raise Exit(1)
    for deletion in () if dry_run else deletions:
        deletion()
    if as_json:
        print_json(values | {"dry_run": dry_run})
    else:
        did = f"{'would delete' if dry_run else 'deleted'} {what}" if deletions else "nothing to delete"
        sys.stdout.write(f"{did}\n")


def is_interactive() -> bool:
    return sys.stdin.isatty()
