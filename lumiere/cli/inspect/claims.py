"""`lumiere inspect claims`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from lumiere.cli.console import CHECK_FAILED, escape, print_json, show_note, stderr, stdout
from lumiere.cli.inspect.command import show_receipts, show_wrapped
from lumiere.cli.options import Device, Json, RunsDir, complete_run
from lumiere.errors import check_choice

if TYPE_CHECKING:
    from lumiere.interpret.claims import CheckedClaims

STYLES = {"pass": "green", "fail": "bold red", "undecided": "yellow"}
Runs = Annotated[
    list[str] | None,
    Option(
        "--run",
        "-r",
        metavar="RUN[@CHECKPOINT]",
        help="Run to check, in place of those of the file. Repeatable.",
        autocompletion=complete_run,
    ),
]
Control = Annotated[
    str | None, Option("--control", metavar="CONTROL", help="untrained: check the models before their first step, too.")
]


def claims(
    file: Annotated[Path, Argument(metavar="FILE", help="A .yaml file of claims; docs/causes.md has the format.")],
    run: Runs = None,
    control: Control = None,
    strict: Annotated[bool, Option("--strict", help="Exit with 3 also if a claim is undecided.")] = False,
    device: Device = "cpu",
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Are these statements about a model true? Each is decided by its interval: pass, fail or undecided.

    The exit code is 3 if one fails. A claim that the untrained model passes as well says nothing.
    """
    from lumiere.api.claim_files import read_claims
    from lumiere.api.claims import check_claims
    from lumiere.api.runs import OpenedRun
    from lumiere.cli.progress import CorpusProgress
    from lumiere.persistence.runs import RunStore, split_reference

    if control is not None:
        check_choice("control", control, ("untrained",))
    found, store = read_claims(file), RunStore(runs_dir)
    opened = []
    for reference in run or found.runs.any:
        name, checkpoint = split_reference(reference, "best")
        opened.append(OpenedRun(store.open(name), checkpoint, device, None, show_note, CorpusProgress))
    result = check_claims(found, opened, untrained=control is not None)
    if as_json:
        from lumiere.api.analysis import model_provenance
        from lumiere.report.results import payload

        about = {"analysis": "claims", "models": [model_provenance(each.opened) for each in opened]}
        print_json(payload(result, about))
    else:
        show_claims(result)
        show_receipts(result.receipts)
    if not result.holds or "fail" in result.verdicts or (strict and "undecided" in result.verdicts):
        failed = [name for name, verdict in zip(result.claims, result.verdicts, strict=True) if verdict != "pass"]
        stderr().print(f"[bold red]not passed:[/] {escape('; '.join(failed) or 'a check')}")
        raise Exit(CHECK_FAILED)


def show_claims(result: "CheckedClaims") -> None:
    """Print a claim a paragraph: its verdict, its statement, and the estimate of each run with its interval."""
    for number, (name, statement) in enumerate(zip(result.claims, result.statements, strict=True)):
        verdict = result.verdicts[number]
        stdout().print(f"[{STYLES[verdict]}]{verdict:9}[/] [bold]{escape(name)}[/]")
        show_wrapped(f"          {escape(statement)}")
        for own, mark in (
            (result.decisions[number], ""),
            (result.controls[number] if result.controls else (), "untrained "),
        ):
            for run, decision in zip(result.runs if own else (), own, strict=True):
                estimate = decision.estimate.value
                value = f"{estimate:+.4f}" if estimate == estimate else "not known"
                if decision.estimate.units:
                    value += f"  {decision.level:.2%} interval {decision.low:+.4f} to {decision.high:+.4f}"
                elif estimate == estimate:
                    value += "  exact, no interval"
                many = f"  {run.split('_')[1][:8] if '_' in run else run}" if len(result.runs) > 1 else ""
                stdout().print(f"          [dim]{mark}{value}{escape(many)}[/]")
        if result.says_nothing(number):
            stdout().print("          [yellow]passes untrained as well: it says nothing[/]")
    counts = ", ".join(f"{result.verdicts.count(each)} {each}" for each in STYLES if each in result.verdicts)
    runs = f"; {result.required} of {len(result.runs)} runs required" if len(result.runs) > 1 else ""
    stdout().print(f"\n[bold]{counts}[/]{runs}")
