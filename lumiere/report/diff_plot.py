"""The difference of two models as a picture: predictions, representations, heads and weights, a panel each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lumiere.interpret.diff import HeadMatches, ModelDiff, stream_names
from lumiere.interpret.predictions import PredictionDiff
from lumiere.interpret.weight_changes import WeightChanges
from lumiere.report.pictures import COLOURS, INK, new_figure, style_axes, style_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "KL: what is lost by expecting one model's next token where the other's is right, in nats. CKA: 1 where two layers "
    "hold the same up to rotation and scale. Heads: the divergence of the patterns of matched heads, 0 alike, 1 "
    "nowhere alike. Weights: the change of each tensor, relative to its size in A."
)
MOST_BARS = 16
"""Heads and tensors of a panel, those that differ most; the files with numbers have all."""
MOST_NUMBERS = 8
"""Layers of a matrix whose cells have room for their numbers."""


def draw_diff(result: ModelDiff) -> Figure:
    """The figure: a panel for each kind of difference that the two models have.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    panels = [
        (draw_predictions, result.predictions),
        (draw_cka, result.cka),
        (draw_heads, result.heads),
        (draw_weights, result.weights if result.weights.tensors else None),
    ]
    shown = [(draw, part) for draw, part in panels if part is not None]
    columns = min(2, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = new_figure(5.5 * columns, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, (draw, part) in zip(axes, shown, strict=False):
        draw(place, part)
        style_axes(place)
        style_text(*place.get_xticklabels(), *place.get_yticklabels())
    for place in axes[len(shown) :]:
        place.remove()
    return figure


def draw_predictions(axes: Axes, found: PredictionDiff) -> None:
    """Both divergences along the window."""
    for values, name, colour, line in (
        (found.kl_ab_by_position, "KL(A||B)", COLOURS[0], "-"),
        (found.kl_ba_by_position, "KL(B||A)", COLOURS[1], "--"),
    ):
        axes.plot(found.position_numbers, values, color=colour, linestyle=line, linewidth=1.2, label=name)
    axes.set_ylim(bottom=0)
    axes.set_title("predictions", loc="left", fontsize=9)
    axes.set_xlabel("position in the window")
    axes.set_ylabel("nats a token")
    style_text(*axes.legend(frameon=False).get_texts())


def draw_cka(axes: Axes, cka: np.ndarray) -> None:
    """The matrix, dark where two layers are alike."""
    axes.imshow(cka, cmap="viridis_r", vmin=0, vmax=1)
    names_a, names_b = (stream_names(count - 1) for count in cka.shape)
    axes.set_xticks(range(len(names_b)), names_b, fontsize=7)
    axes.set_yticks(range(len(names_a)), names_a, fontsize=7)
    if max(cka.shape) <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(cka):
            # White on the dark end of the map, and black on the light one.
            colour = "white" if value > 0.5 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_title("CKA of the residual streams", loc="left", fontsize=9)
    axes.set_xlabel("B")
    axes.set_ylabel("A")


def draw_heads(axes: Axes, heads: HeadMatches) -> None:
    """The matched heads whose patterns differ most."""
    order = np.argsort(-heads.match_divergences, kind="stable")[:MOST_BARS]
    names = [f"{heads.heads_a[a]} → {heads.heads_b[b]}" for a, b in heads.matches[order]]
    draw_bars(axes, names, heads.match_divergences[order])
    axes.set_xlim(0, 1)
    axes.set_title(f"matched heads, A → B: {shown_of(order, heads.match_divergences)}", loc="left", fontsize=9)
    axes.set_xlabel("divergence of patterns")


def draw_weights(axes: Axes, weights: WeightChanges) -> None:
    """The tensors that moved most for their size."""
    order = np.argsort(-np.nan_to_num(weights.relative_changes), kind="stable")[:MOST_BARS]
    names = [weights.tensors[number].removesuffix(".weight") for number in order]
    draw_bars(axes, names, np.nan_to_num(weights.relative_changes[order]))
    axes.set_xlim(left=0)
    axes.set_title(f"weights: {shown_of(order, weights.relative_changes)}", loc="left", fontsize=9)
    axes.set_xlabel("relative change")


def draw_bars(axes: Axes, names: list[str], values: np.ndarray) -> None:
    axes.barh(range(len(names)), values, color=COLOURS[0], edgecolor=INK, linewidth=0.3)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()


def shown_of(order: np.ndarray, values: np.ndarray) -> str:
    return "all" if len(order) == len(values) else f"the {len(order)} of {len(values)} that differ most"
