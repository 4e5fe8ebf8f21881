"""`lumiere runs plot`."""

import shutil
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lumiere.cli.console import duration, is_colored, print_json, show_note
from lumiere.cli.options import Json, RunReferences, RunsDir
from lumiere.cli.streams import is_unicode
from lumiere.errors import LumiereError, printable
from lumiere.persistence.catalog import Entry, distinct, read_entry
from lumiere.persistence.metrics import History, Point, read_history
from lumiere.persistence.runs import RunStore


def plot_runs(
    runs: RunReferences,
    axis: Annotated[str, typer.Option("--x", metavar="AXIS", help="step, tokens or time (of training).")] = "step",
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write a picture: .png, .svg or .html (needs lumiere\\[plot])."
        ),
    ] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Plot training and validation losses of runs in the terminal, or into a picture.

    Long runs are downsampled evenly to 2,000 points per curve. An existing picture is overwritten.

    Example: [bold]lumiere runs plot 3ka5 9xwz --x tokens -o losses.html[/]
    """
    from lumiere.report.figures.curves import LossCurves, check_axis, save_loss_curves
    from lumiere.report.figures.figure import check_picture

    check_axis(axis)
    if output is not None:
        check_picture(Path(output))
        if as_json:
            raise LumiereError("--json and --output exclude each other", "use one of them")
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

    lines = ["loss, nats per token", *draw(histories, axis, terminal_width()), "", *legend(labels)]
    sys.stdout.write("\n".join(lines) + "\n")


def label(entry: Entry) -> str:
    """Name a run and its corpus, without which a loss cannot be compared."""
    return printable(f"{entry.run.id} on {entry.record.dataset or '?'}")


def values(points: tuple[Point, ...]) -> dict[str, list[Any]]:
    """Return points as columns."""
    return {name: [getattr(point, name) for point in points] for name in Point._fields}


# The 256-color terminal's nearest to the colors of the pictures.
COLORS = (32, 166, 36, 175, 214, 117)
CHART_HEIGHT = 18


def draw(histories: Sequence[History], axis: str, width: int, height: int = CHART_HEIGHT) -> list[str]:
    """Plot training as lines and validation as marks: in colors if stdout has them, else as letters."""
    from lumiere.cli.terminal_plots import Curve, chart

    dotted = has_dots()
    curves = []
    for index, history in enumerate(histories):
        training = [(getattr(point, axis), point.loss) for point in history.training]
        letter = string.ascii_lowercase[index % 26]
        curves.append(Curve(training, letter, index % len(COLORS)))
    for index, history in enumerate(histories):
        validation = [(getattr(point, axis), point.loss) for point in history.validation]
        letter = string.ascii_uppercase[index % 26]
        curves.append(Curve(validation, letter, index % len(COLORS), is_marked=True))
    return chart(curves, width, height, X_FORMATS[axis], paint if dotted else None)


def legend(labels: Sequence[str]) -> list[str]:
    """Return a legend line for each run."""
    if has_dots():
        return [f"{paint('⠉⠉', index % len(COLORS))} training  {paint('●', index % len(COLORS))} validation  {label}"
                for index, label in enumerate(labels)]  # fmt: skip
    return [
        f"{string.ascii_lowercase[index % 26]} training  {string.ascii_uppercase[index % 26]} validation  {label}"
        for index, label in enumerate(labels)
    ]


def has_dots() -> bool:
    """Return whether stdout shows colors and braille."""
    return is_unicode() and is_colored()


def paint(text: str, color: int) -> str:
    return typer.style(text, fg=COLORS[color])


def terminal_width() -> int:
    return shutil.get_terminal_size().columns


X_FORMATS: dict[str, Callable[[float], str]] = {
    "step": lambda x: f"step {x:,.0f}",
    "tokens": lambda x: f"{x:,.0f} tokens",
    "time": duration,
}
