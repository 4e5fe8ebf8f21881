"""The picture of activation patching."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lumiere.report.figures.figure import COLORS, Picture, fitted, label_axes, new_figure, style_axes
from lumiere.report.figures.heat_maps import Label, add_scale, fitting_font, heat_map, label_columns, label_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lumiere.interpret.patching import Patching

CELL, ROW, WIDEST, TALLEST = 0.34, 0.24, 15.0, 20.0
MAX_LABELED = 90
"""Rows with labels."""
RATIOS = {
    "denoising": "(M patched − M corrupt) / (M clean − M corrupt): clean activations in the corrupt run",
    "noising": "(M clean − M patched) / (M clean − M corrupt): corrupt activations in the clean run",
    "tracing": "(M patched − M noise) / (M clean − M noise): clean activations in a run with noise on the tokens",
}


def draw_patching(result: Patching, label: Label) -> Picture:
    """Draw a map of the effects; with estimates from gradients, a map of these beside it, and both as points."""
    maps = [("effect", result.effects)]
    if result.estimates is not None:
        maps.append((f"estimate, gradient at the {result.gradient_at} run", result.estimates))
    rows, columns = map_labels(result, label)
    width = float(np.clip(len(columns) * CELL, 2.5, WIDEST / len(maps)))
    height = float(np.clip(len(rows) * ROW, 1.2, TALLEST))
    figure = new_figure((width + 1.2) * len(maps) + 1.5 + 3.0 * (len(maps) > 1), max(height, 2.5) + 1.9)
    panels = list(figure.subplots(1, len(maps) + (len(maps) > 1), squeeze=False)[0])
    largest = float(np.abs(result.effects).max()) or 1.0
    images = []
    for axes, (title, values) in zip(panels, maps, strict=False):
        images.append(heat_map(axes, flattened(result, values), is_signed=True, high=largest))
        label_axes(axes, title)
        label_both(axes, rows, columns, width, is_first=axes is panels[0])
    add_scale(figure, images[-1], panels[: len(maps)], "share of the difference")
    if result.estimates is not None:
        draw_agreement(panels[-1], result)
    caption = (
        f"Activation patching of {result.site} (Vig et al. 2020; Zhang & Nanda 2023). {RATIOS[result.kind]}; "
        f"M: {result.metric}. Effects do not add up, and a cell that shows none may have a substitute."
    )
    return Picture(figure, f"Patching: {result.kind} of {result.site}", caption)


def flattened(result: Patching, values_LUP: np.ndarray) -> np.ndarray:
    """Return a map: layers by units, or layers (and units) by positions."""
    if not result.positions:
        return values_LUP[..., 0]
    return values_LUP.reshape(-1, values_LUP.shape[2])


def map_labels(result: Patching, label: Label) -> tuple[list[str], list[str]]:
    """Return the labels of rows and columns."""
    layers = [f"L{layer}" for layer in result.layers]
    if not result.positions:
        return layers, [f"{result.unit}{unit}" for unit in result.units] or ["all"]
    rows = [result.unit_label(layer, unit) for layer in result.layers for unit in result.units] or layers
    same = [len(set(result.tokens[:, position])) == 1 for position in result.positions]
    tokens = [fitted(label(int(result.tokens[0, position]))) for position in result.positions]
    words = [token if is_same else "…" for token, is_same in zip(tokens, same, strict=True)]
    return rows, [f"{word} {position}" for word, position in zip(words, result.positions, strict=True)]


def label_both(axes: Axes, rows: list[str], columns: list[str], width: float, *, is_first: bool) -> None:
    """Label both sides, with as much as can be read."""
    size = fitting_font(width, len(columns))
    if size is not None:
        label_columns(axes, columns, size, rotation=90)
    if len(rows) <= MAX_LABELED:
        label_rows(axes, rows if is_first else [], fitting_font(len(rows) * ROW, len(rows)) or 5.0)


def draw_agreement(axes: Axes, result: Patching) -> None:
    """Draw estimates over effects, with the line on which they are equal."""
    assert result.estimates is not None
    limits = [min(result.effects.min(), result.estimates.min()), max(result.effects.max(), result.estimates.max())]
    axes.plot(limits, limits, "-", color=COLORS[1], linewidth=0.8)
    axes.plot(result.effects.ravel(), result.estimates.ravel(), ".", color=COLORS[0], markersize=4)
    style_axes(axes)
    axes.tick_params(labelsize=8)
    label_axes(axes, f"Pearson {result.pearson:.2f}, Spearman {result.spearman:.2f}", "effect", "estimate")
