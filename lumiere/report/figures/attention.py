"""Attention as a picture: a map a head, or a layer."""

from __future__ import annotations

import numpy as np

from lumiere.interpret.attention import AttentionPatterns, CombinedAttention
from lumiere.report.figures.heat_maps import Label, add_scale, heat_map, label_tokens, set_title
from lumiere.report.pictures import Picture, new_figure

TOKEN_SIZE = 0.16
"""Inches of a row or a column that can be read with ease."""
LARGEST_MAP, SMALLEST_MAP, WIDEST = 7.0, 1.6, 15.0
"""Inches of a map, and of all that stand side by side."""
IN_A_ROW = 4
"""Maps, where they have no grid of layers and heads."""
KINDS = {
    "pattern": ("Attention", "by softmax(q k / sqrt(d)) (Vaswani et al. 2017)"),
    "value-weighted": ("Attention, weighted by the values' norms", "times the size of what is taken (CircuitsVis)"),
    "norm-weighted": (
        "Attention, weighted by the norms of what is written",
        "times the size of what reaches the residual stream (Kobayashi et al. 2020)",
    ),
    "mean": ("Attention, mean of the heads", "in the mean over the heads of a layer"),
    "max": ("Attention, largest of the heads", "the largest of the heads of a layer"),
    "rollout": ("Attention rollout", "followed through all layers and the residual connections (Abnar & Zuidema 2020)"),
}


def draw_attention(result: AttentionPatterns | CombinedAttention, label: Label) -> Picture:
    """A map a head, layers from top to bottom; a map a layer, where the heads are combined.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    if isinstance(result, AttentionPatterns):
        names = [f"L{layer}H{head}" for layer in result.layers for head in result.heads]
        maps, columns = result.patterns.reshape(-1, *result.patterns.shape[2:]), len(result.heads)
    else:
        names, maps, columns = [f"L{layer}" for layer in result.layers], result.weights, 1
    columns = columns if columns > 1 else min(len(names), IN_A_ROW)
    rows = -(-len(names) // columns)
    size = len(result.tokens)
    side = float(np.clip(size * TOKEN_SIZE, SMALLEST_MAP, min(LARGEST_MAP, max(SMALLEST_MAP, WIDEST / columns))))
    figure = new_figure(columns * side + 1.8, rows * (side + 0.25) + 1.6)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    labels = [label(token) for token in result.tokens]
    images = []
    for number, (name, weights) in enumerate(zip(names, maps, strict=True)):
        images.append(heat_map(panels[number], only_earlier(weights), low=0.0, high=1.0))
        panels[number].set_aspect("equal")
        set_title(panels[number], name)
        is_lowest = number + columns >= len(names)
        label_tokens(panels[number], labels, side, on_rows=number % columns == 0, on_columns=is_lowest)
    for axes in panels[len(names) :]:
        axes.remove()
    add_scale(figure, images[-1], list(panels[: len(names)]), "share of the row")
    title, kind = KINDS[result.kind]
    caption = (
        f"Each row is a token, and its cells are the shares that it takes from the tokens before it and from itself, "
        f"{kind}: the brighter, the more. A share says where information is taken from, not what it does there (Jain & "
        "Wallace 2019)."
    )
    return Picture(figure, title, caption)


def only_earlier(weights_TS: np.ndarray) -> np.ndarray:
    """The same without what lies above the diagonal, where no token can look."""
    return np.where(np.tri(len(weights_TS), dtype=bool), weights_TS, np.nan)
