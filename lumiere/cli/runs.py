"""`lumiere runs`: the runs directory."""

import os
import sys
from datetime import datetime
from typing import Any

import typer

from lumiere.cli.console import escape, guarded, out, print_json, show_note
from lumiere.cli.options import Json, RunReference, RunsDir
from lumiere.errors import printable, shortened
from lumiere.files import read_file
from lumiere.persistence.runs import Run, RunStore

STATUS_STYLES = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red"}
MAX_TEXT = 2000  # characters of one value
MAX_CONFIG_BYTES = 200_000

app = typer.Typer(no_args_is_help=True, help="List and show runs.")


@app.command("ls")
@guarded
def list_runs(runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """List the runs, newest first."""
    store = RunStore(runs_dir)
    runs = store.all()
    if as_json:
        print_json([facts(run) for run in runs])
        return
    if not runs:
        show_note(f"no runs in {store.runs_dir}; train one: lumiere train tiny")
        return
    # Fixed columns and no markup: a table that measures its cells takes a second for a thousand runs.
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lines = [f"{'id':8}  {'status':11}  {'parameters':>10}  {'steps':>9}  {'best loss':>9}  {'age':>7}  corpus"]
    for run in runs:
        record = run.record
        status = run.status
        cell = f"{shortened(printable(status), 11):11}"
        if coloured and status in STATUS_STYLES:
            cell = typer.style(cell, fg=STATUS_STYLES[status])
        lines.append(
            f"{run.id}  {cell}  {short_count(record.get('num_parameters')):>10}  "
            f"{number(record.get('step'), ','):>9}  {number(record.get('best_loss'), '.4f'):>9}  "
            f"{age(run.created_at):>7}  {text(record.get('dataset'))}"
        )
    sys.stdout.write("\n".join(lines) + "\n")


@app.command("show")
@guarded
def show_run(run: RunReference, runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """Show what is known of a run: its record, its checkpoints and its config."""
    from lumiere.persistence.checkpoint_manager import CheckpointManager

    opened = RunStore(runs_dir).open(run)
    checkpoints = CheckpointManager(opened.path.parent).names(opened)
    if as_json:
        print_json(facts(opened) | {"checkpoints": checkpoints})
        return
    record = opened.record
    out().print(f"[bold]{opened.name}[/]  {styled_status(opened.status)}")
    if record.get("error"):
        out().print(f"  {escape(text(record['error'], MAX_TEXT))}", style="red")
    command = record.get("command")
    rows = {
        "path": str(opened.path),
        "command": " ".join(map(str, command)) if isinstance(command, list) else text(command),
        "age": age(opened.created_at),
        "model": f"{number(record.get('num_parameters'), ',')} parameters",
        "corpus": f"{text(record.get('dataset'))} ({text(record.get('corpus_sha256'))[:16]})",
        "progress": f"step {number(record.get('step'), ',')}, epoch {number(record.get('epoch'), '.2f')}, "
        f"{number(record.get('tokens'), ',')} tokens",
        "best": f"validation loss {number(record.get('best_loss'), '.4f')} "
        f"at step {number(record.get('best_step'), ',')}",
        "computed": f"in {text(record.get('precision'))} on {text(record.get('device'))}",
        "checkpoints": ", ".join(checkpoints) or "none",
    }
    for name, value in rows.items():
        out().print(f"[bold]{name:12}[/] {escape(shortened(printable(value), MAX_TEXT))}")
    try:
        config = read_file(opened.config_path, MAX_CONFIG_BYTES).decode()
    except (OSError, ValueError):
        show_note("config.yaml is missing, or cannot be read")
    else:
        out().print(f"\n{escape(config.rstrip())}")


def facts(run: Run) -> dict[str, Any]:
    """What a script wants to know of a run."""
    names = {"run": run.name, "id": run.id, "path": str(run.path)}
    return names | run.record | names  # first, and never the record's own


def styled_status(status: str) -> str:
    return f"[{STATUS_STYLES.get(status, 'dim')}]{escape(shortened(printable(status)))}[/]"


def text(value: Any, length: int = 60) -> str:
    """A value of the record as short, printable text, or a question mark where it is not known."""
    return "?" if value is None else shortened(printable(str(value)), length)


def number(value: Any, form: str) -> str:
    """A number in `form`, or a dash where it is not known."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return shortened(format(value, form), 24) if known else "-"


def short_count(value: Any) -> str:
    """`1.19 M`, `850 K`."""
    if not isinstance(value, int) or isinstance(value, bool):
        return "-"
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.0f} K"


def age(created_at: datetime) -> str:
    """`3 min`, `5 h`, `12 d`."""
    minutes = max(0.0, (datetime.now() - created_at).total_seconds() / 60)
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} d"
