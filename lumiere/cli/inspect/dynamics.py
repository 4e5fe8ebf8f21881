"""`lumiere inspect dynamics`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import escape, sparkline, stdout
from lumiere.cli.inspect.command import analysis, show_wrapped

if TYPE_CHECKING:
    import numpy as np

    from lumiere.api.analysis import Analysis
    from lumiere.interpret.dynamics import Dynamics

PLACE_WIDTH, MAX_COLUMNS = 18, 24
MARK = "bold yellow"

Metrics = Annotated[
    list[str] | None, Option("--metric", "-m", metavar="NAME", help="Metric to follow, of docs/inspect.md. Repeatable.")
]
Every = Annotated[int, Option(metavar="N", min=1, help="Read every N-th snapshot, and the last.")]
Lines = Annotated[int, Option(metavar="K", min=1, help="Heads, pairs or matrices shown of each metric.")]


@analysis(Inspect.dynamics, whole_run=True, metric=Metrics, every=Every)
def dynamics(found: "Analysis[Dynamics]", top_k: Lines = 3) -> None:
    """How did the model develop? Metrics of the other analyses along the snapshots of a run, and phase changes.

    Head scores are measured as by `heads`: on repeated random tokens, or on the text of --prompt, --file or --val. The
    terminal shows the heads, pairs of heads and matrices that changed most; -o FILE has all.
    """
    show_dynamics(found.result, top_k)


def show_dynamics(result: "Dynamics", top_k: int) -> None:
    """Print a sparkline of each series, its first and last value, and its phase change.

    Of each metric, the series that changed most are printed, on one scale.
    """
    import numpy as np

    from lumiere.report.figures.dynamics import claims

    count = len(result.steps)
    columns = np.unique(np.linspace(0, count - 1, min(count, MAX_COLUMNS)).round().astype(int))
    stdout().print(f"[dim]{'':{PLACE_WIDTH + 3}}{ruler(result.steps[columns].tolist())}[/]")
    for metric in dict.fromkeys(result.metrics):
        found = result.series_of(metric)
        show_metric(result, metric, found[:top_k], len(found), columns)
    show_wrapped(f"[dim]{claims(result)}[/]\n")


def ruler(steps: Sequence[int]) -> str:
    """Return the steps above their columns, as many as have room."""
    text = ""
    for column, step in enumerate(steps):
        if not text or len(text) < column - 1:
            text = text.ljust(column) + f"{step:,}"
    return text


def show_metric(result: "Dynamics", name: str, series: Sequence[int], count: int, columns: "np.ndarray") -> None:
    import numpy as np

    from lumiere.interpret.dynamics import METRICS

    metric = METRICS[name]
    baseline = result.baselines[series[0]] if series else np.nan
    chance = f"at chance {baseline:.2f}" if np.isfinite(baseline) else ""
    unit = ", ".join(part for part in ("" if metric.unit == "share" else metric.unit, chance) if part)
    show_wrapped(f"[bold]{name}[/]: {escape(metric.meaning)}" + (f" ({escape(unit)})" if unit else ""))
    values = result.values[series]
    finite = values[np.isfinite(values)]
    if not len(finite):
        stdout().print("  none: this model has no such value\n")
        return
    for number in series:
        row, start, end = result.values[number], int(result.phase_starts[number]), int(result.phase_ends[number])
        curve = sparkline(row[columns].tolist(), float(finite.min()), float(finite.max()))
        padding = " " * (MAX_COLUMNS - len(curve))
        inside = np.flatnonzero((start >= 0) & (result.steps[columns] >= start) & (result.steps[columns] <= end))
        if len(inside):
            first, last = inside[0], inside[-1] + 1
            curve = f"{curve[:first]}[{MARK}]{curve[first:last]}[/]{curve[last:]}"
        ends = row[np.isfinite(row)][[0, -1]] if np.isfinite(row).any() else [np.nan, np.nan]
        line = f"  {escape(result.places[number]):{PLACE_WIDTH}} {curve}{padding}  {ends[0]:>7.2f} {ends[1]:>7.2f}"
        stdout().print(f"{line}  [{MARK}]{start:,}-{end:,}[/]" if start >= 0 else line)
    if count > len(series):
        stdout().print(f"  [dim]and {count - len(series)} that changed less[/]")
    stdout().print()
