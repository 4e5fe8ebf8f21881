"""`lumiere runs plot`."""

import shutil
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from lumiere.cli.console import duration, is_colored, print_json, show_note
from lumiere.cli.options import Json, RunReferences, RunsDir
from lumiere.cli.streams import is_unicode
from lumiere.errors import LumiereError, check_choice, printable, refuse_both
from lumiere.persistence.catalog import read_entry
from lumiere.persistence.metrics import History, Point, read_history
from lumiere.persistence.runs import RunStore


def plot_runs(
    runs: RunReferences,
    axis: Annotated[str, Option("--x", metavar="AXIS", help="step, tokens or time (of training).")] = "step",
    output: Annotated[
        str | None,
        Option("--output", "-o", metavar="FILE", help="Write a picture: .png, .svg or .html (needs lumiere\\[plot])."),
    ] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Plot training and validation losses of runs in the terminal, or into a picture.

    Long runs are downsampled evenly to 2,000 points per curve. An existing picture is overwritten.

    Example: [bold]lumiere runs plot 3ka5 9xwz --x tokens -o losses.html[/]
    """
    from lumiere.report.figures.curves import AXES, draw_loss_curves
    from lumiere.report.figures.figure import check_picture, save_picture

    check_choice("axis", axis, AXES)
    if output is not None:
        check_picture(Path(output))
        refuse_both({"--json": as_json, "--output": output})
    entries = [read_entry(run) for run in RunStore(runs_dir).open_all(runs)]
    histories = [read_history(entry.run.metrics_path) for entry in entries]
    if as_json:
        kinds = ({"training": columns(each.training), "validation": columns(each.validation)} for each in histories)
        print_json([{"run": entry.run.name} | kind for entry, kind in zip(entries, kinds, strict=True)])
        return
    for entry, history in zip(entries, histories, strict=True):
        if not (history.training or history.validation):
            raise LumiereError(f"run {entry.run.id} has no losses yet", "lumiere runs ls shows how far each run is")
    # With its corpus, without which a loss cannot be compared.
    labels = [printable(f"{entry.run.id} on {entry.record.dataset or '?'}") for entry in entries]
    if output is not None:
        save_picture(Path(output), draw_loss_curves(list(zip(labels, histories, strict=True)), axis))
        show_note(f"wrote {printable(output)}")
        return
    lines = ["loss, nats per token", *draw(histories, axis), "", *legend(labels)]
    sys.stdout.write("\n".join(lines) + "\n")


def columns(points: tuple[Point, ...]) -> dict[str, list[Any]]:
    return {name: [getattr(point, name) for point in points] for name in Point._fields}


# The 256-color terminal's nearest to the colors of the pictures.
COLORS = (32, 166, 36, 175, 214, 117)
CHART_HEIGHT = 18


def draw(histories: Sequence[History], axis: str, height: int = CHART_HEIGHT) -> list[str]:
    """Plot training as lines and validation as marks: in colors if stdout has them, else as letters."""
    from lumiere.cli.terminal_plots import Curve, chart

    curves = [
        Curve([(getattr(point, axis), point.loss) for point in points], letters[i % 26], i % len(COLORS), is_marked)
        for is_marked, letters in ((False, string.ascii_lowercase), (True, string.ascii_uppercase))
        for i, history in enumerate(histories)
        for points in [history.validation if is_marked else history.training]
    ]
    width = shutil.get_terminal_size().columns
    return chart(curves, width, height, X_FORMATS[axis], paint if has_dots() else None)


def legend(labels: Sequence[str]) -> list[str]:
    """Return a legend line for each run."""
    lines = []
    for i, label in enumerate(labels):
        marks = (string.ascii_lowercase[i % 26], string.ascii_uppercase[i % 26])
        if has_dots():
            marks = (paint("⠉⠉", i % len(COLORS)), paint("●", i % len(COLORS)))
        lines.append(f"{marks[0]} training  {marks[1]} validation  {label}")
    return lines


def has_dots() -> bool:
    """Return whether stdout shows colors and braille."""
    return is_unicode() and is_colored()


def paint(text: str, color: int) -> str:
    return typer.style(text, fg=COLORS[color])


X_FORMATS: dict[str, Callable[[float], str]] = {
    "step": lambda x: f"step {x:,.0f}",
    "tokens": lambda x: f"{x:,.0f} tokens",
    "time": duration,
}
