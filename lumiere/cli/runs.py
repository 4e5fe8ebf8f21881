"""`lumiere runs`: the runs directory."""

import os
import sys
from datetime import datetime
from typing import Any

import typer

from lumiere.cli.console import escape, guarded, out, print_json, show_note
from lumiere.cli.options import Json, RunReference, RunsDir
from lumiere.cli.runs_card import show_card
from lumiere.persistence.runs import Run, RunStore

STATUS_STYLES = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red"}

app = typer.Typer(no_args_is_help=True, help="List, show and describe runs.")

app.command("card")(guarded(show_card))


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
        cell = f"{printable(status):11}"
        if coloured and status in STATUS_STYLES:
            cell = typer.style(cell, fg=STATUS_STYLES[status])
        lines.append(
            f"{run.id}  {cell}  {short_count(record.get('num_parameters')):>10}  "
            f"{number(record.get('step'), ','):>9}  {number(record.get('best_loss'), '.4f'):>9}  "
            f"{age(run.created_at):>7}  {printable(str(record.get('dataset', '?')))}"
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
        out().print(f"  {escape(printable(str(record['error'])))}", style="red")
    rows = {
        "path": str(opened.path),
        "command": " ".join(record.get("command", [])),
        "age": age(opened.created_at),
        "model": f"{number(record.get('num_parameters'), ',')} parameters",
        "corpus": f"{record.get('dataset', '?')} ({str(record.get('corpus_sha256', '?'))[:16]})",
        "progress": f"step {number(record.get('step'), ',')}, epoch {number(record.get('epoch'), '.2f')}, "
        f"{number(record.get('tokens'), ',')} tokens",
        "best": f"validation loss {number(record.get('best_loss'), '.4f')} "
        f"at step {number(record.get('best_step'), ',')}",
        "computed": f"in {record.get('precision', '?')} on {record.get('device', '?')}",
        "checkpoints": ", ".join(checkpoints) or "none",
    }
    for name, value in rows.items():
        out().print(f"[bold]{name:12}[/] {escape(printable(value))}")
    out().print(f"\n{escape(opened.config_path.read_text(encoding='utf-8').rstrip())}")


def facts(run: Run) -> dict[str, Any]:
    """What a script wants to know of a run."""
    return {"run": run.name, "id": run.id, "path": str(run.path)} | run.record


def styled_status(status: str) -> str:
    return f"[{STATUS_STYLES.get(status, 'dim')}]{escape(printable(status))}[/]"


def printable(text: str) -> str:
    """`text` with control characters made visible: what a file holds must not steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def number(value: Any, form: str) -> str:
    """A number in `form`, or a dash where it is not known."""
    return format(value, form) if isinstance(value, int | float) else "-"


def short_count(value: Any) -> str:
    """`1.19 M`, `850 K`."""
    if not isinstance(value, int):
        return "-"
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.0f} K"


def age(created_at: datetime) -> str:
    """`3 min`, `5 h`, `12 d`."""
    minutes = max(0.0, (datetime.now() - created_at).total_seconds() / 60)
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} d"
