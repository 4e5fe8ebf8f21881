"""Numbers along a training as a picture: one panel a metric over log steps, the loss first, phase changes marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lumiere.interpret.dynamics import METRICS, Dynamics
from lumiere.report.pictures import COLOURS, INK, LINE_STYLES, new_figure, style_axes, style_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Each panel is a number along the snapshots of one training, over log steps. Coloured: those that changed most; "
    "grey: all others; dotted: what chance gives. A band is the phase change of the first curve, if one is claimed: "
    "a fast change between two levels, steeper than the rest of the curve over log steps and over steps."
)
NAMED = 3
"""Curves of a panel with a colour and a name."""
TICKS = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)


def claims(result: Dynamics) -> str:
    """How many phase changes are claimed, and in how many series."""
    found = int((result.phase_starts >= 0).sum())
    return (
        f"Phase changes: {found:,} found in {result.num_tried:,} series tried. In a phase change, a curve moves fast "
        "from one level to another; up to 5% of random walks seem to."
    )


def draw_dynamics(result: Dynamics) -> Figure:
    """The figure: the training's loss, then a panel for each metric, in two columns.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    metrics = list(dict.fromkeys(result.metrics))
    with_curve = bool(len(result.curve_steps))
    num_panels = max(1, len(metrics) + with_curve)
    num_rows = -(-num_panels // 2)
    figure = new_figure(10, 2.7 * num_rows)
    panels = figure.subplots(num_rows, 2, squeeze=False, sharex=True).flatten()
    if with_curve:
        draw_curve(panels[0], result)
    for axes, metric in zip(panels[int(with_curve) :], metrics, strict=False):
        draw_metric(axes, result, metric)
    for axes in panels[num_panels:]:
        axes.remove()
    for number, axes in enumerate(panels[:num_panels]):
        style_panel(axes, int(result.steps[-1]), with_label=number + 2 >= num_panels)
    return figure


def draw_curve(axes: Axes, result: Dynamics) -> None:
    """The loss as it was measured while training."""
    within = result.curve_steps <= result.steps[-1]
    axes.plot(positions(result.curve_steps[within]), result.curve_losses[within], color=COLOURS[0], linewidth=1)
    axes.set_title("training loss (nats)", loc="left", fontsize=9)


def draw_metric(axes: Axes, result: Dynamics, metric: str) -> None:
    """Its curves, those that changed most above the others."""
    series, x = result.series_of(metric), positions(result.steps)
    for number in series[NAMED:]:
        axes.plot(x, result.values[number], color=INK, alpha=0.15, linewidth=0.8)
    for rank, number in reversed(list(enumerate(series[:NAMED]))):
        colour, style = COLOURS[rank], LINE_STYLES[rank % len(LINE_STYLES)]
        place = result.places[number] or metric
        axes.plot(x, result.values[number], style, color=colour, marker="o", markersize=2.5, label=place)
        errors = result.errors[number]
        if np.isfinite(errors).any():
            axes.fill_between(
                x, result.values[number] - errors, result.values[number] + errors, color=colour, alpha=0.2
            )
    baseline = result.baselines[series[0]]
    if np.isfinite(baseline):
        axes.axhline(baseline, color=INK, alpha=0.5, linewidth=0.8, linestyle=":")
    start, end = result.phase_starts[series[0]], result.phase_ends[series[0]]
    if start >= 0:
        axes.axvspan(*positions(np.array([start, end])), color=COLOURS[0], alpha=0.12, linewidth=0)
    unit = METRICS[metric].unit
    axes.set_title(f"{metric} ({unit})" if unit else metric, loc="left", fontsize=9)
    if result.places[series[0]]:
        handles, labels = axes.get_legend_handles_labels()
        legend = axes.legend(handles[::-1], labels[::-1], fontsize=7, frameon=False)
        style_text(*legend.get_texts())


def style_panel(axes: Axes, last_step: int, *, with_label: bool) -> None:
    ticks = [step for step in TICKS if step <= last_step]
    axes.set_xticks(positions(np.array(ticks)), [f"{step:,}" for step in ticks])
    axes.tick_params(labelsize=7, labelbottom=with_label)
    if with_label:
        axes.set_xlabel("step", fontsize=8)
    style_axes(axes)


def positions(steps: np.ndarray | Sequence[int]) -> np.ndarray:
    """Where steps stand on the axis, log2(1 + step), so that step 0 has a place."""
    return np.log2(1.0 + np.asarray(steps))
