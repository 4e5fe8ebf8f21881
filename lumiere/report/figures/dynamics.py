"""Metrics over training: a picture with one panel per metric, and an interactive page.

Both show log steps and mark phase changes. The page draws its curves as SVG; the script only moves a cursor and writes
values, so that without scripts the page is still a picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lumiere.report.figures.figure import (
    COLORS,
    INK,
    LINE_STYLES,
    Picture,
    add_legend,
    label_axes,
    new_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lumiere.interpret.dynamics import Dynamics

CAPTION = (
    "Each panel shows a metric over the snapshots of one training run, over log steps. Colored: the series that "
    "changed most; gray: all others; dotted: chance level. A band marks the phase change of the first series, if one "
    "was found: a fast change between two levels, steeper than the rest of the curve over log steps and over steps."
)
PICTURE_SERIES, PAGE_SERIES = 3, len(COLORS)
"""Series of a panel with a color and a name."""
TICKS = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 170, 44, 412, 8, 150
"""Size of a panel of the page, and the edges of its plot, in SVG units."""


def log_steps(steps: Any) -> np.ndarray:
    """log2(1 + step), the x-axis: step 0 is at 0."""
    return np.log2(1.0 + np.asarray(steps))


def claims(result: Dynamics) -> str:
    """The number of phase changes found, and of series searched."""
    found = int((result.phase_starts >= 0).sum())
    return (
        f"Phase changes: {found:,} found in {result.num_tried:,} series searched. In a phase change, a curve moves "
        "fast from one level to another; up to 5% of random walks appear to."
    )


def training_curve(result: Dynamics) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of the training curve up to the last snapshot."""
    shown = result.curve_steps <= result.steps[-1]
    return result.curve_steps[shown], result.curve_losses[shown]


def draw_dynamics(result: Dynamics) -> Picture:
    """Draw the training loss, then a panel for each metric, in two columns."""
    metrics = list(dict.fromkeys(result.metrics))
    with_curve = bool(len(result.curve_steps))
    num_panels = max(1, len(metrics) + with_curve)
    num_rows = -(-num_panels // 2)
    figure = new_figure(10, 2.7 * num_rows)
    panels = figure.subplots(num_rows, 2, squeeze=False, sharex=True).flatten()
    if with_curve:
        steps, losses = training_curve(result)
        panels[0].plot(log_steps(steps), losses, color=COLORS[0], linewidth=1)
        label_axes(panels[0], "training loss (nats)")
    for axes, metric in zip(panels[int(with_curve) :], metrics, strict=False):
        draw_metric(axes, result, metric)
    for axes in panels[num_panels:]:
        axes.remove()
    ticks = [step for step in TICKS if step <= result.steps[-1]]
    for number, axes in enumerate(panels[:num_panels]):
        is_lowest = number + 2 >= num_panels
        axes.set_xticks(log_steps(ticks), [f"{step:,}" for step in ticks])
        axes.tick_params(labelsize=7, labelbottom=is_lowest)
        label_axes(axes, xlabel="step" if is_lowest else "")
        style_axes(axes)
    return Picture(figure, "Metrics over training", CAPTION, page=lambda title: dynamics_page(result, title))


def draw_metric(axes: Axes, result: Dynamics, metric: str) -> None:
    """Draw the series of a metric, those that changed most on top."""
    from lumiere.interpret.dynamics import METRICS

    series, x = result.series_of(metric), log_steps(result.steps)
    for number in series[PICTURE_SERIES:]:
        axes.plot(x, result.values[number], color=INK, alpha=0.15, linewidth=0.8)
    for rank, number in reversed(list(enumerate(series[:PICTURE_SERIES]))):
        color, values, errors = COLORS[rank], result.values[number], result.errors[number]
        place = result.places[number] or metric
        axes.plot(x, values, LINE_STYLES[rank], color=color, marker="o", markersize=2.5, label=place)
        if np.isfinite(errors).any():
            axes.fill_between(x, values - errors, values + errors, color=color, alpha=0.2)
    first = series[0]
    if np.isfinite(result.baselines[first]):
        axes.axhline(result.baselines[first], color=INK, alpha=0.5, linewidth=0.8, linestyle=":")
    if result.phase_starts[first] >= 0:
        start, end = log_steps([result.phase_starts[first], result.phase_ends[first]])
        axes.axvspan(start, end, color=COLORS[0], alpha=0.12, linewidth=0)
    unit = METRICS[metric].unit
    label_axes(axes, f"{metric} ({unit})" if unit else metric)
    if result.places[first]:
        handles, labels = axes.get_legend_handles_labels()
        add_legend(axes, handles=handles[::-1], labels=labels[::-1], fontsize=7)


def dynamics_page(result: Dynamics, title: str) -> str:
    """Render the interactive page as self-contained HTML."""
    from lumiere.report.rendering import Scale, render_html

    x = Scale(0.0, max(float(log_steps(result.steps[-1])), 1.0), LEFT, RIGHT)
    metrics = list(dict.fromkeys(result.metrics))
    shown = [number for metric in metrics for number in result.series_of(metric)[:PAGE_SERIES]]
    data = {
        "steps": result.steps.tolist(),
        "places": [round(place, 2) for place in x(log_steps(result.steps)).tolist()],
        "values": {number: [v if np.isfinite(v) else None for v in result.values[number].tolist()] for number in shown},
    }
    panels = [curve_panel(result, x)] if len(result.curve_steps) else []
    return render_html(
        "dynamics.html.j2",
        title=title,
        caption=f"{CAPTION} {claims(result)}",
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        ticks=[(float(x(log_steps(step))), step) for step in TICKS if step <= result.steps[-1]],
        panels=[*panels, *(metric_panel(result, metric, x) for metric in metrics)],
        data=data,
    )


def curve_panel(result: Dynamics, x: Any) -> dict[str, Any]:
    """What the template needs to draw the training loss."""
    from lumiere.report.rendering import svg_path

    steps, losses = training_curve(result)
    y, grid = value_axis(losses)
    path = svg_path(zip(x(log_steps(steps)).tolist(), y(losses).tolist(), strict=True))
    curve = {"path": path, "color": COLORS[0], "name": "training loss"}
    return {"name": "training loss", "meaning": "one batch per point (nats)", "grid": grid, "curves": [curve]}


def metric_panel(result: Dynamics, metric: str, x: Any) -> dict[str, Any]:
    """What the template needs to draw a metric: the first series last, so that they lie on top."""
    from lumiere.interpret.dynamics import METRICS
    from lumiere.report.rendering import svg_path

    series, about = result.series_of(metric), METRICS[metric]
    baseline = float(result.baselines[series[0]])
    y, grid = value_axis(np.append(result.values[series], baseline))
    places = x(log_steps(result.steps)).tolist()
    curves = [
        {
            "path": svg_path(zip(places, y(result.values[number]).tolist(), strict=True)),
            "color": COLORS[rank] if rank < PAGE_SERIES else None,
            "name": result.places[number] or metric,
            "series": number,
            "phase": phase_steps(result, number),
        }
        for rank, number in enumerate(series)
    ]
    phase = phase_steps(result, series[0])
    return {
        "name": metric,
        "meaning": about.meaning + (f" ({about.unit})" if about.unit not in ("", "share") else ""),
        "grid": grid,
        "phase": None if phase is None else (*x(log_steps(phase)).tolist(), *phase),
        "chance": (float(y(baseline)), baseline) if np.isfinite(baseline) else None,
        "curves": curves,
    }


def phase_steps(result: Dynamics, number: int) -> tuple[int, int] | None:
    """First and last step of the phase change of a series."""
    start, end = int(result.phase_starts[number]), int(result.phase_ends[number])
    return (start, end) if start >= 0 else None


def value_axis(values: np.ndarray) -> tuple[Any, list[tuple[float, str]]]:
    """The scale that spans the finite values, and its grid lines with their labels."""
    from lumiere.report.rendering import Scale

    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    y = Scale(low, high, BOTTOM, TOP)
    return y, [(float(y(value)), f"{value:.3g}") for value in np.linspace(low, high, 4)]
