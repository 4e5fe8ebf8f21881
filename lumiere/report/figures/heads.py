"""Scores of heads, and what it costs the model to be without a part, as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lumiere.interpret.ablation import Ablations
from lumiere.interpret.head_scores import HeadScores
from lumiere.report.figures.heat_maps import (
    NEGATIVE,
    POSITIVE,
    add_scale,
    fitting_font,
    heat_map,
    label_columns,
    label_rows,
    set_title,
    write_cells,
)
from lumiere.report.pictures import COLOURS, INK, Picture, new_figure, style_axes, style_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.21
"""Inches of a line."""
MOST_WRITTEN = 16
"""Units of a layer whose cells hold their numbers."""
MOST_BARS = 16


def draw_heads(result: HeadScores) -> Picture:
    """What each head looks at, whether it copies, and the loss along the text.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    names = [f"L{layer}H{head}" for layer in result.layers for head in result.heads]
    scores = result.scores.reshape(len(names), -1)
    height = max(len(names) * ROW, 2.5)
    figure = new_figure(12.5, height + 2.2)
    score_axes, copying_axes, loss_axes = figure.subplots(1, 3, width_ratios=(5, 1, 5))
    image = heat_map(score_axes, scores, low=0.0, high=1.0)
    label_rows(score_axes, names)
    label_columns(
        score_axes,
        result.score_names,
    )
    write_cells(score_axes, image, [["" if np.isnan(value) else f"{value:.0%}" for value in row] for row in scores])
    set_title(score_axes, "share of the attention")
    baseline = ", ".join(
        f"{name} {value:.0%}"
        for name, value in zip(result.score_names, result.uniform, strict=True)
        if np.isfinite(value)
    )
    score_axes.set_xlabel(f"a uniform head has: {baseline}", fontsize=8)
    style_text(score_axes.xaxis.label)
    add_scale(figure, image, score_axes, "share")
    copying = result.copying.reshape(-1, 1)
    image = heat_map(copying_axes, copying, is_signed=True)
    image.set_clim(-1.0, 1.0)
    write_cells(copying_axes, image, [["" if np.isnan(value) else f"{value:+.2f}" for value in row] for row in copying])
    label_columns(copying_axes, [""])
    label_rows(copying_axes, [])
    set_title(copying_axes, "copying")
    draw_losses(loss_axes, result)
    caption = (
        "Left: the share of its attention that each head gives to exactly these tokens (prefix matching and others, "
        "Olsson et al. 2022); middle: whether it copies what it sees (blue) or suppresses it (red), from the weights "
        "(Elhage et al. 2021). Right: the loss along the sequences, which falls where heads find what came before."
    )
    return Picture(figure, "What each head is for", caption)


def draw_losses(axes: Axes, result: HeadScores) -> None:
    """The loss at each position; of two copies the second is drawn over the first."""
    places = np.arange(1, len(result.losses) + 1)
    if np.isnan(result.repeat_gap):
        axes.plot(places, result.losses, color=COLOURS[0], linewidth=1.4)
    else:
        length = len(result.losses) // 2
        axes.plot(places[:length], result.losses[:length], color=COLOURS[0], label="first copy")
        axes.plot(places[:length], result.losses[length : 2 * length], "--", color=COLOURS[1], label="second copy")
        style_text(*axes.legend(fontsize=8, frameon=False).get_texts())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("token", fontsize=8)
    axes.set_ylabel("loss (nats)", fontsize=8)
    axes.tick_params(labelsize=8)
    style_axes(axes)
    set_title(axes, "mean loss along the sequences")


def draw_ablations(result: Ablations) -> Picture:
    """The change of the loss without each part: all of them as a signed map, the strongest as bars.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    layers = list(dict.fromkeys(result.layers.tolist()))
    changes_LU = result.changes.reshape(len(layers), -1)
    num_units = changes_LU.shape[1]
    num_bars = min(MOST_BARS, len(result.order))
    figure = new_figure(11.0, max(len(layers) * 0.45, num_bars * ROW, 1.8) + 2.0)
    map_axes, bar_axes = figure.subplots(1, 2, width_ratios=(3, 2) if num_units > 1 else (1, 3))
    image = heat_map(map_axes, changes_LU, is_signed=True)
    label_rows(map_axes, [f"L{layer}" for layer in layers])
    if num_units <= MOST_WRITTEN:
        size = fitting_font(6.0 / num_units, 1) or 6.0
        write_cells(map_axes, image, [[f"{change:+.3f}" for change in row] for row in changes_LU], min(size, 7.0))
        names = [f"{result.unit} {index}" if num_units > 1 else "" for index in result.indices[:num_units]]
        label_columns(map_axes, names, rotation=90 if num_units > 6 else 0)
    else:
        map_axes.set_xlabel(f"{result.unit} {result.indices[0]} to {result.indices[-1]}", fontsize=8)
        label_columns(map_axes, [])
        style_text(map_axes.xaxis.label)
    set_title(map_axes, "all")
    add_scale(figure, image, map_axes, "change of the loss (nats)")
    strongest = result.order[:num_bars]
    draw_bars(bar_axes, result, strongest)
    errors = " Lines are standard errors, clustered by document." if result.num_documents > 1 else ""
    caption = (
        f"By how much the loss of {result.loss:.3f} nats a token rises (blue: the part was of use) or falls (red) when "
        f"one {result.unit} is replaced by {replacement(result.mode)}.{errors}"
    )
    return Picture(figure, f"The loss without each {result.unit}", caption)


def draw_bars(axes: Axes, result: Ablations, chosen: np.ndarray) -> None:
    changes, rows = result.changes[chosen], np.arange(len(chosen))
    errors = result.standard_errors[chosen]
    colours = [POSITIVE if change > 0 else NEGATIVE for change in changes]
    axes.barh(rows, changes, color=colours, height=0.7)
    if np.isfinite(errors).all():
        axes.errorbar(changes, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.invert_yaxis()
    label_rows(axes, [result.labels[number] for number in chosen])
    axes.set_xlabel("change of the loss (nats)", fontsize=8)
    style_axes(axes)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    set_title(axes, "largest first")


def replacement(mode: str) -> str:
    return {
        "mean": "its mean (Wang et al. 2022)",
        "zero": "nothing (Meyes et al. 2019)",
        "resample": "what it does in another text (Chan et al. 2022)",
    }[mode]
