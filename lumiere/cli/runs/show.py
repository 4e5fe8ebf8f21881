"""`lumiere runs show`."""

import shlex
from typing import Any

from lumiere.cli.console import STATUS_STYLES, age, escape, number, print_json, size, stdout, text_cell
from lumiere.cli.options import Json, RunReference, RunsDir
from lumiere.cli.runs.ls import facts
from lumiere.errors import ConfigError, printable, shortened
from lumiere.persistence.catalog import Entry, read_entry
from lumiere.persistence.runs import RunStore

MAX_TEXT = 2000  # characters of one value
SHOWN_CHECKPOINTS = 5
"""More snapshots are summarized in one line; `--json` lists all."""


def show_run(run: RunReference, runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """Show everything recorded about a run: results, settings, machine, disk usage, how to repeat it.

    Example: [bold]lumiere runs show latest[/]
    """
    entry = read_entry(RunStore(runs_dir).open(run))
    details = describe(entry)
    if as_json:
        print_json(details)
    else:
        show(entry, details)


def describe(entry: Entry) -> dict[str, Any]:
    """Return the facts of `runs ls`, and those that take longer to read."""
    from dataclasses import asdict

    from lumiere.persistence.catalog import changed_values, checkpoint_files, config_values, disk_bytes
    from lumiere.persistence.metrics import last_records
    from lumiere.persistence.notes import read_evaluations

    run = entry.run
    training, evaluation = last_records(run.metrics_path)
    try:
        config, problem = config_values(run), None
        changed = {key: {"value": pair[0], "default": pair[1]} for key, pair in changed_values(run).items()}
    except ConfigError as error:
        config, changed, problem = None, None, error.message
    return facts(entry) | {
        "config": config,
        "config_problem": problem,
        "changed": changed,
        "last_training": training,
        "last_evaluation": evaluation,
        "checkpoints": [asdict(checkpoint) for checkpoint in checkpoint_files(run)],
        "evaluations": [asdict(kept) for kept in read_evaluations(run)],
        "disk_bytes": disk_bytes(run.path),
        "repeat": shlex.join(["lumiere", "train", str(run.config_path)]),
        "original_command": original_command(entry),
    }


def original_command(entry: Entry) -> str | None:
    """Return what the user typed, quoted for a shell."""
    return shlex.join(entry.record.command) or None


def show(entry: Entry, details: dict[str, Any]) -> None:

    record, run = entry.record, entry.run
    style = STATUS_STYLES.get(entry.status, "dim")
    stdout().print(f"[bold]{run.name}[/]  [{style}]{escape(text_cell(entry.status))}[/]")
    if record.error:
        stdout().print(f"  {escape(text_cell(record.error, MAX_TEXT))}", style="red")
    row("tags", " ".join(entry.notes.tags))
    row("note", entry.notes.text)
    row("age", age(run.created_at))
    row("model", f"{number(record.num_parameters, ',')} parameters")
    row("corpus", f"{text_cell(record.dataset)} ({text_cell(record.corpus_sha256)[:16]})")
    row("progress", progress(details))
    row(
        "best",
        f"validation loss {number(record.best_loss, '.4f')} at step {number(record.best_step, ',')}",
    )
    row("last", last(details))
    row("speed", speed(details))
    row("computed", f"in {record.precision or '?'} on {record.device or '?'}")
    row("machine", machine(record.machine))
    row("versions", pairs(record.versions))
    row("commit", record.commit or "")
    row("disk", f"{size(details['disk_bytes'])} in {run.path}")
    heading("checkpoints")
    for line in checkpoint_lines(details["checkpoints"]):
        stdout().print(f"  {escape(printable(line))}")
    if details["evaluations"]:
        heading("evaluations")
        for kept in details["evaluations"]:
            stdout().print(f"  {escape(printable(evaluation_line(kept)))}")
    heading("repeat")
    stdout().print(f"  {escape(printable(details['repeat']))}")
    if details["original_command"]:
        command = shortened(printable(details["original_command"]), MAX_TEXT)
        stdout().print(f"  {escape(command)}  [dim]original command[/]")
    show_config(details)


def evaluation_line(kept: dict[str, Any]) -> str:
    if kept["problem"]:
        return f"{text_cell(kept['name'], MAX_TEXT)}  damaged: {text_cell(kept['problem'])}"
    found = kept["figures"]
    return (
        f"{text_cell(kept['checkpoint'])} (step {number(kept['step'], ',')}) on {text_cell(kept['corpus'])}, "
        f"{text_cell(kept['protocol'])}: loss {number(found['loss'], '.4f')}, "
        f"bits per byte {number(found['bits_per_byte'], '.4f')}, accuracy {number(found['accuracy'], '.2%')}"
    )


def show_config(details: dict[str, Any]) -> None:
    """Print each setting, with its default if changed."""
    heading("config")
    if details["config"] is None:
        stdout().print(f"  {escape(printable(details['config_problem']))}")
        return
    width = max(map(len, details["config"]))
    for key, value in details["config"].items():
        line = f"{printable(key):{width}}  {setting(value)}"
        if key in details["changed"]:
            default = setting(details["changed"][key]["default"])
            stdout().print(f"  [bold]{escape(line)}[/]  [dim]default {escape(default)}[/]")
        else:
            stdout().print(f"  {escape(line)}")


def setting(value: Any) -> str:
    """Format a setting as JSON; single words without quotes."""
    from lumiere.persistence.metrics import to_json

    text = value if isinstance(value, str) and value and " " not in value else to_json(value)
    return printable(text)


def heading(text: str) -> None:
    stdout().print(f"\n[bold]{text}[/]")


def row(name: str, value: str) -> None:
    """Print one row, unless the value is empty."""
    if value:
        stdout().print(f"[bold]{name:10}[/] {escape(shortened(printable(value), MAX_TEXT))}")


def progress(details: dict[str, Any]) -> str:
    """Format the progress from the metrics, which are newer than the record during training."""
    newest = details["last_training"] or details["last_evaluation"] or details
    total = number(details.get("total_steps"), ",")
    of_total = f" of {total}" if total != "-" else ""
    return (
        f"step {number(newest.get('step'), ',')}{of_total}, epoch {number(newest.get('epoch'), '.2f')}, "
        f"{number(newest.get('tokens'), ',')} tokens"
    )


def last(details: dict[str, Any]) -> str:
    training, evaluation = details["last_training"], details["last_evaluation"]
    parts = []
    if training:
        parts.append(f"training loss {number(training.get('loss'), '.4f')} at step {number(training['step'], ',')}")
    if evaluation:
        parts.append(
            f"validation loss {number(evaluation.get('val_loss'), '.4f')}, perplexity "
            f"{number(evaluation.get('val_perplexity'), ',.2f')}, bits per byte "
            f"{number(evaluation.get('val_bits_per_byte'), '.4f')} at step {number(evaluation['step'], ',')}"
        )
    return "; ".join(parts)


def speed(details: dict[str, Any]) -> str:
    training = details["last_training"]
    if not training:
        return ""
    speed, mfu = number(training.get("tokens_per_second"), ",.0f"), number(training.get("mfu"), ".0%")
    return f"{speed} tokens/s, {mfu} MFU"


def machine(value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    gpus = value.get("gpus") or []
    names = ", ".join(map(str, gpus)) if isinstance(gpus, list) else str(gpus)
    parts = [value.get("host"), value.get("system"), f"{number(value.get('threads'), ',')} threads", names]
    return ", ".join(str(part) for part in parts if part)


def pairs(value: Any) -> str:
    return ", ".join(f"{key} {version}" for key, version in value.items()) if isinstance(value, dict) else ""


def checkpoint_lines(checkpoints: list[dict[str, Any]]) -> list[str]:

    named = [c for c in checkpoints if not c["name"].startswith("step-")]
    snapshots = [c for c in checkpoints if c["name"].startswith("step-")]
    shown = named if len(snapshots) > SHOWN_CHECKPOINTS else named + snapshots
    lines = [
        f"{c['name']:13}  step {number(c['step'], ','):>9}  {size(c['num_bytes']):>8}"
        + (f"  damaged: {c['problem']}" if c["problem"] else "")
        for c in shown
    ]
    if len(snapshots) > SHOWN_CHECKPOINTS:
        total = sum(c["num_bytes"] for c in snapshots)
        steps = ", ".join(number(c["step"], ",") for c in (*snapshots[:3], snapshots[-1]))
        lines.append(f"{len(snapshots)} snapshots   steps {', ... '.join(steps.rsplit(', ', 1))}  {size(total)}")
    return lines or ["none"]
