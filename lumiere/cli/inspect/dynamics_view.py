"""Numbers along a training in a terminal: a sparkline a series, its ends, and its phase change."""

from collections.abc import Sequence

import numpy as np

from lumiere.cli.console import escape, sparkline, stdout
from lumiere.interpret.dynamics import METRICS, Dynamics
from lumiere.report.figures.dynamics import claims

PLACE_WIDTH = 18
MOST_COLUMNS = 24
MARK = "bold yellow"


def show(result: Dynamics, top_k: int) -> None:
    """Each metric: its heads, pairs or matrices that changed most, all on the scale of those that are shown."""
    columns = shown_columns(result)
    stdout().print(f"[dim]{'':{PLACE_WIDTH + 3}}{ruler(result.steps[columns].tolist())}[/]")
    for metric in dict.fromkeys(result.metrics):
        found = result.series_of(metric)
        show_metric(result, metric, found[:top_k], len(found), columns)
    stdout().print(f"[dim]{claims(result)}[/]\n", soft_wrap=False)


def shown_columns(result: Dynamics) -> np.ndarray:
    """The snapshots that have a column, by index: all, or so many that they fit, the ends among them."""
    count = len(result.steps)
    return np.unique(np.linspace(0, count - 1, min(count, MOST_COLUMNS)).round().astype(int))


def ruler(steps: Sequence[int]) -> str:
    """The steps above their columns, as many as have room."""
    text = ""
    for column, step in enumerate(steps):
        if not text or len(text) < column - 1:
            text = text.ljust(column) + f"{step:,}"
    return text


def show_metric(result: Dynamics, metric: str, series: Sequence[int], count: int, columns: np.ndarray) -> None:
    about = METRICS[metric]
    baseline = result.baselines[series[0]] if series else np.nan
    unit = ", ".join(
        part
        for part in (
            "" if about.unit == "share" else about.unit,
            "" if np.isnan(baseline) else f"by chance {baseline:.2f}",
        )
        if part
    )
    stdout().print(
        f"[bold]{metric}[/]: {escape(about.meaning)}" + (f" ({escape(unit)})" if unit else ""), soft_wrap=False
    )
    values = result.values[series]
    finite = values[np.isfinite(values)]
    if not len(finite):
        stdout().print("  none: there is no such number in this model\n")
        return
    for number in series:
        row = result.values[number]
        low, high = float(finite.min()), float(finite.max())
        curve = marked(sparkline(row[columns].tolist(), low, high), result, number, columns)
        ends = row[np.isfinite(row)][[0, -1]] if np.isfinite(row).any() else [np.nan, np.nan]
        phase = phase_of(result, number)
        line = f"  {escape(result.places[number]):{PLACE_WIDTH}} {curve}  {ends[0]:>7.2f} {ends[1]:>7.2f}"
        stdout().print(f"{line}  [{MARK}]{phase}[/]" if phase else line)
    if count > len(series):
        stdout().print(f"  [dim]and {count - len(series)} that changed less[/]")
    stdout().print()


def marked(curve: str, result: Dynamics, number: int, columns: np.ndarray) -> str:
    """The curve in as many columns as there are, its phase change in colour."""
    padding = " " * (MOST_COLUMNS - len(curve))
    start, end = result.phase_starts[number], result.phase_ends[number]
    inside = (result.steps[columns] >= start) & (result.steps[columns] <= end) & (start >= 0)
    if not inside.any():
        return curve + padding
    first, last = int(inside.argmax()), len(curve) - int(inside[::-1].argmax())
    return f"{curve[:first]}[{MARK}]{curve[first:last]}[/]{curve[last:]}{padding}"


def phase_of(result: Dynamics, number: int) -> str:
    start, end = int(result.phase_starts[number]), int(result.phase_ends[number])
    return f"{start:,}-{end:,}" if start >= 0 else ""
