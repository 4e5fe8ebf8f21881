"""Direct logit attribution as a picture: bars that add up, or parts by positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lumiere.interpret.logit_attribution import LogitAttribution
from lumiere.report.figures.heat_maps import (
    NEGATIVE,
    POSITIVE,
    Label,
    add_scale,
    heat_map,
    label_columns,
    label_rows,
    set_title,
)
from lumiere.report.labels import fitted
from lumiere.report.pictures import INK, Picture, new_figure, style_axes, style_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS, MOST_ROWS = 24, 40
MOST_PANELS = 3
"""Positions with bars of their own; of more there is one map."""
ROW, COLUMN = 0.21, 0.3
"""Inches."""


def draw_logits(result: LogitAttribution, label: Label) -> Picture:
    """Which part writes the logit: a waterfall for each of a few positions, a signed map of many.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    if len(result.positions) <= MOST_PANELS:
        figure = draw_bars(result, label)
        seen = "Each bar begins where the last one ended, and together they reach the model's own logit"
    else:
        figure = draw_map(result, label)
        seen = "Blue adds to the logit, red takes from it, and each column sums to the model's own logit"
    caption = f"Direct logit attribution (Elhage et al. 2021): what each part writes in the token's direction. {seen}."
    return Picture(figure, f"Who writes the logit, by {result.by}", caption)


def draw_bars(result: LogitAttribution, label: Label) -> Any:
    all_parts = [largest(named_parts(result, column, label)) for column in range(len(result.positions))]
    num_rows = max(map(len, all_parts))
    figure = new_figure(max(6.5, 5.0 * len(all_parts)), num_rows * ROW + 2.0)
    for column, axes in enumerate(figure.subplots(1, len(all_parts), squeeze=False)[0]):
        draw_waterfall(axes, all_parts[column])
        position = result.positions[column]
        where = f"after {fitted(label(result.tokens[position]))} at position {position}"
        set_title(axes, f"logit of {fitted(label(result.targets[column]))}{reference(result, label)}\n{where}")
    return figure


def draw_waterfall(axes: Axes, parts: list[tuple[str, float]]) -> None:
    added = np.array([value for _, value in parts])
    ends = added.cumsum()
    colours = [POSITIVE if value > 0 else NEGATIVE for value in added]
    rows = np.arange(len(parts))
    axes.barh(rows, added, left=ends - added, color=colours, height=0.7)
    axes.barh(len(parts), ends[-1], color=INK, alpha=0.55, height=0.7)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.invert_yaxis()
    label_rows(axes, [*(name for name, _ in parts), "sum"])
    reach = np.concatenate([ends, ends - added, [0.0]])
    span = float(np.ptp(reach)) or 1.0
    axes.set_xlim(reach.min() - 0.02 * span, reach.max() + 0.16 * span)
    for row, (value, right) in enumerate(
        zip([*added, ends[-1]], [*np.maximum(ends, ends - added), max(ends[-1], 0.0)], strict=True)
    ):
        number = axes.text(right + 0.01 * span, row, f"{value:+.2f}", va="center", fontsize=7)
        style_text(number)
    style_axes(axes)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("logit", fontsize=8)


def draw_map(result: LogitAttribution, label: Label) -> Any:
    columns = [dict(named_parts(result, column, label)) for column in range(len(result.positions))]
    names = list(dict.fromkeys(name for column in columns for name in column))
    values = np.array([[column.get(name, np.nan) for column in columns] for name in names])
    if len(names) > MOST_ROWS:
        kept = np.sort(np.argsort(-np.nanmax(np.abs(values), axis=1), kind="stable")[:MOST_ROWS])
        names, values = [names[row] for row in kept], values[kept]
    figure = new_figure(max(6.0, len(columns) * COLUMN + 3.0), len(names) * ROW + 2.8)
    axes = figure.add_subplot()
    image = heat_map(axes, values, is_signed=True)
    label_rows(axes, names)
    tokens = [fitted(label(result.tokens[position])) for position in result.positions]
    targets = [fitted(label(target)) for target in result.targets]
    label_columns(axes, tokens, rotation=90)
    axes.set_xlabel("token, and above it the one whose logit is explained", fontsize=8)
    above = axes.secondary_xaxis("top")
    above.set_xticks(range(len(targets)), targets, rotation=90, fontsize=8)
    above.tick_params(length=0)
    above.spines[:].set_visible(False)
    style_text(axes.xaxis.label, *above.get_xticklabels())
    add_scale(figure, image, axes, f"added to the logit{reference(result, label)}")
    return figure


def reference(result: LogitAttribution, label: Label) -> str:
    """What was taken from the logit."""
    if result.versus is not None:
        return f" less that of {fitted(label(result.versus))}"
    if result.reference == "prediction":
        return " less the mean under p"
    return f" less the mean of {result.num_averaged:,}" if result.reference == "mean" else ""


def largest(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """At most `MOST_BARS` of them in their order, and the sum of the others."""
    kept = set(sorted(range(len(parts)), key=lambda number: -abs(parts[number][1]))[:MOST_BARS])
    rest = [added for number, (_, added) in enumerate(parts) if number not in kept]
    shown = [part for number, part in enumerate(parts) if number in kept]
    return [*shown, (f"{len(rest):,} others", sum(rest))] if rest else shown


def named_parts(result: LogitAttribution, column: int, label: Label) -> list[tuple[str, float]]:
    """What is added up at the result's level of detail at one of its positions, by name."""
    return by_source(result, column, label) if result.by == "source" else by_part(result, column)


def by_part(result: LogitAttribution, column: int) -> list[tuple[str, float]]:
    """The parts by name; the finer levels have many, and so the largest come first."""
    parts = [(part_name(part), float(added_P[column])) for part, added_P in result.parts(result.by)]
    return parts if result.by == "layer" else sorted(parts, key=lambda part: -abs(part[1]))


def part_name(part: Mapping[str, Any]) -> str:
    match part:
        case {"part": "head", "layer": layer, "head": head}:
            return f"L{layer}H{head}"
        case {"part": "neuron", "layer": layer, "neuron": neuron}:
            return f"L{layer}N{neuron}"
        case {"part": "feedforward", "layer": layer}:
            return f"L{layer} feed-forward"
        case {"part": "attention", "layer": layer}:
            return f"L{layer} attention"
        case {"part": "pos_embed"}:
            return "position"
        case _:
            return "embed"


def by_source(result: LogitAttribution, column: int, label: Label) -> list[tuple[str, float]]:
    """What all heads together take from each token of the text, and what is written at the position itself."""
    sources_HS = result.sources[column].reshape(-1, len(result.tokens))
    taken_S = sources_HS.sum(axis=0)[: result.positions[column] + 1]
    parts = [
        (f"{source:3} {fitted(label(result.tokens[source]))}", float(taken_S[source])) for source in range(len(taken_S))
    ]
    own = [
        (part_name(part), float(added_P[column])) for part, added_P in result.parts("source") if part["part"] != "head"
    ]
    return parts + own
