"""`lumiere runs show`."""

import shlex
from collections.abc import Mapping
from typing import Any

from lumiere.cli.console import STATUS_STYLES, age, escape, number, print_json, setting, size, stdout, text_cell
from lumiere.cli.options import Json, RunReference, RunsDir
from lumiere.cli.runs.ls import facts
from lumiere.errors import ConfigError, printable, shortened
from lumiere.persistence.catalog import Entry, read_entry
from lumiere.persistence.record import RunRecord
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
    config, changed, problem = None, None, None
    try:
        config = config_values(run)
        changed = {key: {"value": pair[0], "default": pair[1]} for key, pair in changed_values(run).items()}
    except ConfigError as error:
        problem = error.message
    return facts(entry) | {
        "config": config,
        "config_problem": problem,
        "changed": changed,
        "last_training": training,
        "last_evaluation": evaluation,
        "checkpoints": [asdict(checkpoint) for checkpoint in checkpoint_files(run)],
        "evaluations": [asdict(kept) for kept in read_evaluations(run)],
        "disk_bytes": disk_bytes(run.path),
        "repeat": shlex.join(["lumiere", *repeated(entry)]),
        "original_command": shlex.join(entry.record.command) or None,
    }


def show(entry: Entry, details: dict[str, Any]) -> None:
    record, run = entry.record, entry.run
    stdout().print(
        f"[bold]{run.name}[/]  [{STATUS_STYLES.get(entry.status, 'dim')}]{escape(text_cell(entry.status))}[/]"
    )
    if record.error:
        stdout().print(f"  {escape(text_cell(record.error, MAX_TEXT))}", style="red")
    training = details["last_training"]
    tokens_per_second, mfu = number(training.get("tokens_per_second"), ",.0f"), number(training.get("mfu"), ".0%")
    best = f"validation loss {number(record.best_loss, '.4f')} at step {number(record.best_step, ',')}"
    is_imported = entry.status == "imported"
    for name, value in {
        "tags": " ".join(entry.notes.tags),
        "note": entry.notes.text,
        "age": age(run.created_at),
        "model": parameters(record),
        "from": ", from ".join(map(ancestor, record.ancestors)),
        "source": source(record.source) if is_imported else "",
        "corpus": "" if is_imported else f"{text_cell(record.dataset)} ({text_cell(record.corpus_sha256)[:16]})",
        "progress": "" if is_imported else progress(details),
        "best": "" if is_imported else best,
        "last": last(details),
        "speed": f"{tokens_per_second} tokens/s, {mfu} MFU" if training else "",
        "computed": "" if is_imported else f"in {record.precision or '?'} on {record.device or '?'}",
        "machine": machine(record.machine),
        "versions": ", ".join(f"{package} {version}" for package, version in record.versions.items()),
        "commit": record.commit,
        "disk": f"{size(details['disk_bytes'])} in {run.path}",
    }.items():
        if value:
            stdout().print(f"[bold]{name:10}[/] {escape(shortened(printable(value), MAX_TEXT))}")
    print_section("checkpoints", *checkpoint_lines(details["checkpoints"]))
    if details["evaluations"]:
        print_section("evaluations", *map(evaluation_line, details["evaluations"]))
    print_section("repeat", details["repeat"])
    if details["original_command"]:
        command = shortened(printable(details["original_command"]), MAX_TEXT)
        stdout().print(f"  {escape(command)}  [dim]original command[/]")
    print_section("config", *([details["config_problem"]] if details["config"] is None else []))
    width = max(map(len, details["config"] or [""]))
    for key, value in (details["config"] or {}).items():
        line = escape(f"{printable(key):{width}}  {setting(value)}")
        if key in details["changed"]:
            default = escape(setting(details["changed"][key]["default"]))
            line = f"[bold]{line}[/]  [dim]default {default}[/]"
        stdout().print(f"  {line}")


def parameters(record: RunRecord) -> str:
    """Format the number of parameters, and how many of them are trained if some are frozen."""
    total, trained = record.num_parameters, record.num_trained_parameters
    is_frozen = trained is not None and trained != total
    return f"{number(total, ',')} parameters" + (f", {number(trained, ',')} of them trained" if is_frozen else "")


def source(recorded: Mapping[str, Any]) -> str:
    """Say where an imported model is from, and whether its computation was compared."""
    place = " at ".join(text_cell(recorded[key]) for key in ("path", "commit") if key in recorded)
    checked = "compared with" if recorded.get("verified") else "not compared with"
    return f"{place} ({text_cell(recorded.get('model_type'))}, {checked} transformers)"


def repeated(entry: Entry) -> list[str]:
    """Return the command, without the name of the program, that makes such a run again."""
    if entry.status == "imported":
        return ["import", str(entry.record.source.get("path"))]
    return ["train", str(entry.run.config_path), *start(entry.record.parent)]


def ancestor(parent: Mapping[str, Any]) -> str:
    """Describe a checkpoint that training started from."""
    name = f"{text_cell(parent.get('run'))}@{text_cell(parent.get('checkpoint'))}"
    return f"{name} (step {number(parent.get('step'), ',')}, {text_cell(parent.get('dataset'))})"


def start(parent: Mapping[str, Any]) -> list[str]:
    """Return the option that starts a run from the weights of its parent."""
    return ["--from", f"{parent.get('run')}@{parent.get('checkpoint')}"] if parent else []


def print_section(heading: str, *lines: str) -> None:
    stdout().print(f"\n[bold]{heading}[/]")
    for line in lines:
        stdout().print(f"  {escape(printable(line))}")


def evaluation_line(kept: dict[str, Any]) -> str:
    if kept["problem"]:
        return f"{text_cell(kept['name'], MAX_TEXT)}  damaged: {text_cell(kept['problem'])}"
    found = kept["figures"]
    return (
        f"{text_cell(kept['checkpoint'])} (step {number(kept['step'], ',')}) on {text_cell(kept['corpus'])}, "
        f"{text_cell(kept['protocol'])}: loss {number(found['loss'], '.4f')}, "
        f"bits per byte {number(found['bits_per_byte'], '.4f')}, accuracy {number(found['accuracy'], '.2%')}"
    )


def progress(details: dict[str, Any]) -> str:
    """Format the progress by the metrics, which are newer than the record during training."""
    newest = details["last_training"] or details["last_evaluation"] or details
    total = number(details.get("total_steps"), ",")
    of_total = f" of {total}" if total != "-" else ""
    step, epoch = number(newest.get("step"), ","), number(newest.get("epoch"), ".2f")
    return f"step {step}{of_total}, epoch {epoch}, {number(newest.get('tokens'), ',')} tokens"


def last(details: dict[str, Any]) -> str:
    """Format the last training and evaluation lines of the metrics."""
    training, evaluation, parts = details["last_training"], details["last_evaluation"], []
    if training:
        parts.append(f"training loss {number(training.get('loss'), '.4f')} at step {number(training['step'], ',')}")
    if evaluation:
        parts.append(
            f"validation loss {number(evaluation.get('val_loss'), '.4f')}, perplexity "
            f"{number(evaluation.get('val_perplexity'), ',.2f')}, bits per byte "
            f"{number(evaluation.get('val_bits_per_byte'), '.4f')} at step {number(evaluation['step'], ',')}"
        )
    return "; ".join(parts)


def machine(recorded: Mapping[str, Any]) -> str:
    if not recorded:
        return ""
    gpus = recorded.get("gpus") or []
    names = ", ".join(map(str, gpus)) if isinstance(gpus, list) else str(gpus)
    threads = f"{number(recorded.get('threads'), ',')} threads"
    return ", ".join(str(part) for part in (recorded.get("host"), recorded.get("system"), threads, names) if part)


def checkpoint_lines(checkpoints: list[dict[str, Any]]) -> list[str]:
    """Describe each checkpoint; many snapshots in one line."""
    snapshots = [c for c in checkpoints if c["name"].startswith("step-")]
    are_many = len(snapshots) > SHOWN_CHECKPOINTS
    lines = [
        f"{c['name']:13}  step {number(c['step'], ','):>9}  {size(c['num_bytes']):>8}"
        + (f"  damaged: {c['problem']}" if c["problem"] else "")
        for c in checkpoints
        if not (are_many and c in snapshots)
    ]
    if are_many:
        total = size(sum(c["num_bytes"] for c in snapshots))
        *first, end = (number(c["step"], ",") for c in (*snapshots[:3], snapshots[-1]))
        lines.append(f"{len(snapshots)} snapshots   steps {', '.join(first)}, ... {end}  {total}")
    return lines or ["none"]
