"""The figure of the heads' circuits: how earlier heads compose with later ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lumiere.report.figures.figure import Picture, label_axes, new_figure
from lumiere.report.figures.heat_maps import add_scale, fitting_font, heat_map, label_columns, label_rows

if TYPE_CHECKING:
    from lumiere.interpret.head_weights import HeadWeights

NAMES = {"q": "Q-composition", "k": "K-composition", "v": "V-composition"}
CELL, SMALLEST, LARGEST = 0.22, 2.2, 6.0
"""Inches of a cell, and of a map."""


def draw_head_weights(result: HeadWeights) -> Picture:
    """Draw the composition of each head with each head of a later layer, in multiples of chance."""
    layers, heads = (result.pairs[:, [column, column + 2]].max(initial=0) + 1 for column in (0, 1))
    places = list(np.ndindex(layers, heads))
    number = {place: index for index, place in enumerate(places)}
    earlier, later = ([number[tuple(pair)] for pair in result.pairs[:, part].tolist()] for part in ([0, 1], [2, 3]))
    rows, columns = places[: len(places) - heads], places[heads:]  # only earlier layers write, only later ones read
    side = float(np.clip(CELL * len(rows), SMALLEST, LARGEST))
    figure = new_figure(3 * side + 2.4, side + 1.3)
    panels = figure.subplots(1, 3)
    high = max(2.0, float(np.nanmax(result.scores / result.chance, initial=0)))
    font = fitting_font(side, max(1, len(rows)))
    image = None
    for axes, kind, scores in zip(panels, result.kinds, result.scores.T, strict=True):
        values = np.full((len(rows), len(columns)), np.nan)
        values[earlier, np.array(later, dtype=int) - heads] = scores / result.chance
        image = heat_map(axes, values, low=0.0, high=high)
        label_axes(axes, NAMES[kind], "later head", "earlier head" if axes is panels[0] else "")
        if font is not None:
            label_rows(axes, named(rows) if axes is panels[0] else [], font)
            label_columns(axes, named(columns), font, rotation=90)
    assert image is not None
    add_scale(figure, image, list(panels), "multiples of chance")
    highs = ", ".join(
        f"{kind.upper()} {value / result.chance:.2f}"
        for kind, value in zip(result.kinds, result.random_highs, strict=True)
    )
    caption = (
        "How strongly what an earlier head writes is read by a later head's queries, keys and values: the norm of the "
        "product of their circuits over the product of their norms (Elhage et al. 2021). 1 is chance; the largest of "
        f"100 random pairs is {highs}."
    )
    return Picture(figure, "Composition of heads", caption)


def named(places: Sequence[tuple[int, ...]]) -> list[str]:
    return [f"L{layer}H{head}" for layer, head in places]
