"""`lumiere runs plot`."""

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lumiere.cli.console import print_json, show_note
from lumiere.cli.options import Json, RunReferences, RunsDir
from lumiere.errors import LumiereError, printable
from lumiere.persistence.catalog import Entry, distinct, read_entry
from lumiere.persistence.metrics import Point, read_history
from lumiere.persistence.runs import RunStore


def plot_runs(
    runs: RunReferences,
    axis: Annotated[str, typer.Option("--x", metavar="AXIS", help="step, tokens or time (of training).")] = "step",
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write a picture: .png, .svg or .html (needs lumiere\\[plot])."
        ),
    ] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Draw the training and validation losses of runs, in the terminal or into a file, which is overwritten.

    Of a long training, lines of metrics are left out evenly, so that a curve has 2,000 points at most.
    """
    from lumiere.report.figures.curves import LossCurves, check_axis, save_loss_curves
    from lumiere.report.figures.figure import check_picture

    check_axis(axis)
    if output is not None:
        check_picture(Path(output))
        if as_json:
            raise LumiereError("--json and --output both answer", "give one of them at a time")
    store = RunStore(runs_dir)
    entries = [read_entry(run) for run in distinct([store.open(reference) for reference in runs])]
    histories = [read_history(entry.run.metrics_path) for entry in entries]
    if as_json:
        print_json(
            [
                {
                    "run": entry.run.name,
                    "training": values(history.training),
                    "validation": values(history.validation),
                }
                for entry, history in zip(entries, histories, strict=True)
            ]
        )
        return
    for entry, history in zip(entries, histories, strict=True):
        if not (history.training or history.validation):
            raise LumiereError(f"run {entry.run.id} has no losses yet", "lumiere runs ls shows how far each run is")
    labels = [label(entry) for entry in entries]
    if output is not None:
        curves = [LossCurves(name, history) for name, history in zip(labels, histories, strict=True)]
        save_loss_curves(Path(output), curves, axis)
        show_note(f"wrote {printable(output)}")
        return
    from lumiere.cli.runs.curves import draw, legend, terminal_width

    lines = ["loss, nats a token", *draw(histories, axis, terminal_width()), "", *legend(labels)]
    sys.stdout.write("\n".join(lines) + "\n")


def label(entry: Entry) -> str:
    """The run and its corpus: a loss says nothing without what it is over."""
    return printable(f"{entry.run.id} on {entry.record.get('dataset', '?')}")


def values(points: tuple[Point, ...]) -> dict[str, list[Any]]:
    """Points as columns."""
    return {name: [getattr(point, name) for point in points] for name in Point._fields}
