"""Numbers along a training as one interactive page: a file of its own, without any other.

Point at a panel, or move with the arrow keys, and all panels show their values at that snapshot. The curves are SVG
that is written here; the few lines of JavaScript only move a line and write numbers, and without them the page is a
picture.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lumiere.interpret.dynamics import METRICS, Dynamics
from lumiere.report.figures.figure import COLOURS, INK, LINE_STYLES, new_figure, style_axes, style_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Each panel is a number along the snapshots of one training, over log steps. Coloured: those that changed most; "
    "grey: all others; dotted: what chance gives. A band is the phase change of the first curve, if one is claimed: "
    "a fast change between two levels, steeper than the rest of the curve over log steps and over steps."
)
NAMED_IN_PICTURE = 3
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
    for number in series[NAMED_IN_PICTURE:]:
        axes.plot(x, result.values[number], color=INK, alpha=0.15, linewidth=0.8)
    for rank, number in reversed(list(enumerate(series[:NAMED_IN_PICTURE]))):
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


NAMED = 6
"""Curves of a panel with a colour, a name and a number: as many as there are colours."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 170, 44, 8, 8, 20

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ color: #111; background: #fff; font: 16px/1.45 system-ui, sans-serif; }}
body {{ max-width: 68rem; margin: 1.5rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1rem; margin: 0; }}
#panels {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }}
#panels:focus-visible {{ outline: 2px solid #0072B2; outline-offset: 6px; }}
section p {{ margin: 0; font-size: .85rem; opacity: .8; }}
svg {{ width: 100%; height: auto; display: block; touch-action: pan-y; }}
svg text {{ font-size: 10px; fill: currentColor; }}
.curve {{ fill: none; stroke-width: 1.6; }} .rest {{ stroke: currentColor; opacity: .18; stroke-width: 1; }}
.grid {{ stroke: currentColor; opacity: .12; }} .chance {{ stroke: currentColor; opacity: .6; stroke-dasharray: 2 3; }}
.phase {{ fill: #0072B2; opacity: .14; }} .cursor {{ stroke: currentColor; opacity: .7; }}
ul {{ list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; }}
li b {{ display: inline-block; width: .8rem; height: .25rem; vertical-align: middle; margin-right: .3rem; }}
li output {{ font-variant-numeric: tabular-nums; font-weight: 600; }}
#step {{ position: sticky; top: 0; padding: .4rem 0; background: Canvas; font-weight: 600; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #eee; background: #111; }} #step {{ background: #111; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{caption}</p>
<p id="step" aria-live="polite"></p>
<div id="panels" tabindex="0" role="group" aria-label="Panels; the arrow keys move along the snapshots">
{panels}
</div>
<script type="application/json" id="data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""
SCRIPT = """\
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const panels = document.getElementById("panels");
let current = data.steps.length - 1;
function show(index) {
  current = Math.max(0, Math.min(data.steps.length - 1, index));
  document.getElementById("step").textContent =
    "step " + data.steps[current].toLocaleString("en") + " (point at a panel, or use the arrow keys)";
  for (const line of document.querySelectorAll(".cursor")) {
    line.setAttribute("x1", data.places[current]);
    line.setAttribute("x2", data.places[current]);
  }
  for (const cell of document.querySelectorAll("output")) {
    const value = data.values[cell.dataset.series][current];
    cell.textContent = value === null ? "none" : value.toFixed(3);
  }
}
function nearest(event) {
  const svg = event.target.closest("svg");
  if (!svg) return;
  const box = svg.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
  const distances = data.places.map(place => Math.abs(place - x));
  show(distances.indexOf(Math.min(...distances)));
}
panels.addEventListener("pointermove", nearest);
panels.addEventListener("pointerdown", nearest);
panels.addEventListener("keydown", event => {
  const target = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: data.steps.length - 1 }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  show(target);
});
show(current);
"""


def dynamics_page(result: Dynamics, title: str) -> str:
    """The page, with all that it needs in it."""
    metrics = list(dict.fromkeys(result.metrics))
    shown = [number for metric in metrics for number in result.series_of(metric)[:NAMED]]
    data = {
        "steps": result.steps.tolist(),
        "places": [round(x, 2) for x in across(result.steps, result.steps[-1]).tolist()],
        "values": {str(number): [finite(value) for value in result.values[number].tolist()] for number in shown},
    }
    panels = [curve_panel(result)] if len(result.curve_steps) else []
    panels += [metric_panel(result, metric) for metric in metrics]
    return PAGE.format(
        title=html.escape(title),
        caption=html.escape(f"{CAPTION} {claims(result)}"),
        panels="\n".join(panels),
        # No text in it ends the element early.
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        script=SCRIPT,
    )


def curve_panel(result: Dynamics) -> str:
    """The loss as it was measured while training, up to the last snapshot."""
    within = result.curve_steps <= result.steps[-1]
    losses, steps = result.curve_losses[within], result.curve_steps[within]
    scale = scale_of([losses])
    line = path(
        across(steps, result.steps[-1]), up(losses, scale), f'class="curve" stroke="{COLOURS[0]}"', "training loss"
    )
    return section("training loss", "one batch a point, in nats", frame(result, scale), line, "")


def metric_panel(result: Dynamics, metric: str) -> str:
    """The curves of a metric: those that changed most with a name and a number."""
    series, about = result.series_of(metric), METRICS[metric]
    baseline = float(result.baselines[series[0]])
    scale = scale_of([result.values[series].flatten(), np.array([baseline])])
    x, marks = across(result.steps, result.steps[-1]), []
    start, end = int(result.phase_starts[series[0]]), int(result.phase_ends[series[0]])
    if start >= 0:
        left, right = across(np.array([start, end]), result.steps[-1])
        marks.append(
            f'<rect class="phase" x="{left:.2f}" y="{TOP}" width="{right - left:.2f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>phase change: steps {start:,} to {end:,}</title></rect>"
        )
    if np.isfinite(baseline):
        y = up(np.array([baseline]), scale)[0]
        marks.append(
            f'<line class="chance" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.2f}" y2="{y:.2f}">'
            f"<title>by chance {baseline:.3f}</title></line>"
        )
    items = []
    for rank, number in reversed(list(enumerate(series))):
        style = f'class="curve" stroke="{COLOURS[rank]}"' if rank < NAMED else 'class="curve rest"'
        marks.append(path(x, up(result.values[number], scale), style, result.places[number] or metric))
    for rank, number in enumerate(series[:NAMED]):
        name = html.escape(result.places[number] or metric)
        phase = ""
        if result.phase_starts[number] >= 0:
            phase = f" · phase change {result.phase_starts[number]:,}–{result.phase_ends[number]:,}"
        items.append(
            f'<li><b style="background:{COLOURS[rank]}"></b>{name} <output data-series="{number}"></output>{phase}</li>'
        )
    meaning = about.meaning + (f" ({about.unit})" if about.unit not in ("", "share") else "")
    return section(metric, meaning, frame(result, scale), "".join(marks), f"<ul>{''.join(items)}</ul>")


def section(name: str, meaning: str, axes: str, marks: str, legend: str) -> str:
    cursor = f'<line class="cursor" x1="{WIDTH}" x2="{WIDTH}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(name)}">{axes}{marks}{cursor}</svg>'
    )
    return f"<section><h2>{html.escape(name)}</h2><p>{html.escape(meaning)}</p>{picture}{legend}</section>"


def frame(result: Dynamics, scale: tuple[float, float]) -> str:
    """Grid, and the numbers along both axes."""
    parts = []
    for step in (step for step in TICKS if step <= result.steps[-1]):
        x = across(np.array([step]), result.steps[-1])[0]
        parts.append(f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.2f}" y="{HEIGHT - 6}" text-anchor="middle">{step:,}</text>')
    for value in np.linspace(*scale, 4):
        y = up(np.array([value]), scale)[0]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.2f}" y2="{y:.2f}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3:.2f}" text-anchor="end">{value:.3g}</text>')
    return "".join(parts)


def path(x: np.ndarray, y: np.ndarray, style: str, name: str) -> str:
    """A line that is broken where there is no number."""
    pieces, pen = [], "M"
    for left, down in zip(x.tolist(), y.tolist(), strict=True):
        if np.isfinite(down):
            pieces.append(f"{pen}{left:.2f} {down:.2f}")
            pen = "L"
        else:
            pen = "M"
    return f'<path {style} d="{"".join(pieces)}"><title>{html.escape(name)}</title></path>'


def scale_of(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """The lowest and the highest number, a little apart where they are the same."""
    numbers = np.concatenate(values)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return 0.0, 1.0
    low, high = float(numbers.min()), float(numbers.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def across(steps: np.ndarray, last_step: int) -> np.ndarray:
    return LEFT + positions(steps) / max(float(positions([last_step])[0]), 1.0) * (WIDTH - LEFT - RIGHT)


def up(values: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    return HEIGHT - BOTTOM - (values - scale[0]) / (scale[1] - scale[0]) * (HEIGHT - TOP - BOTTOM)


def finite(value: float) -> Any:
    return value if np.isfinite(value) else None
