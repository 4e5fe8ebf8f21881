"""The difference of two models as a picture: predictions, representations, heads and weights, a panel each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lumiere.interpret.model_diff import HeadMatches, ModelDiff, PredictionDiff, WeightChanges, stream_names
from lumiere.report.figures.heat_maps import heat_map, label_columns, label_rows, set_title, write_cells
from lumiere.report.pictures import COLOURS, Picture, new_figure, style_axes, style_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAPTION = (
    "KL: what is lost by expecting one model's next token where the other's is right, in nats. CKA (Kornblith et al. "
    "2019): 1 where two layers hold the same up to rotation and scale. Heads: how much the patterns of matched heads "
    "differ (Lin 1991), from 0, alike, to 1, nowhere alike. Weights: the change of each tensor, relative to its size "
    "in A."
)
MOST_BARS = 16
"""Heads and tensors of a panel, those that differ most; the files with numbers have all."""
MOST_WRITTEN = 8
"""Layers of a matrix whose cells hold their numbers."""


def draw_diff(result: ModelDiff) -> Picture:
    """A panel for each kind of difference that the two models have.

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
        style_text(place.xaxis.label, place.yaxis.label)
    for place in axes[len(shown) :]:
        place.remove()
    return Picture(figure, "What is different between two models", CAPTION)


def draw_predictions(axes: Axes, found: PredictionDiff) -> None:
    """Both divergences along the window."""
    for values, name, colour, line in (
        (found.kl_ab_by_position, "KL(A||B)", COLOURS[0], "-"),
        (found.kl_ba_by_position, "KL(B||A)", COLOURS[1], "--"),
    ):
        axes.plot(found.position_numbers, values, color=colour, linestyle=line, linewidth=1.2, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the window", fontsize=8)
    axes.set_ylabel("nats a token", fontsize=8)
    style_axes(axes)
    set_title(axes, "predictions")
    style_text(*axes.legend(frameon=False, fontsize=8).get_texts())


def draw_cka(axes: Axes, cka: np.ndarray) -> None:
    """The matrix of all pairs of layers."""
    image = heat_map(axes, cka, low=0.0, high=1.0)
    names_a, names_b = (stream_names(count - 1) for count in cka.shape)
    label_rows(axes, names_a)
    label_columns(axes, names_b, rotation=0 if len(names_b) <= MOST_WRITTEN else 90)
    if max(cka.shape) <= MOST_WRITTEN + 1:
        write_cells(axes, image, [["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in cka])
    axes.set_xlabel("B", fontsize=8)
    axes.set_ylabel("A", fontsize=8)
    set_title(axes, "CKA of the residual streams")


def draw_heads(axes: Axes, heads: HeadMatches) -> None:
    """The matched heads whose patterns differ most."""
    order = np.argsort(-heads.match_divergences, kind="stable")[:MOST_BARS]
    names = [f"{heads.heads_a[a]} → {heads.heads_b[b]}" for a, b in heads.matches[order]]
    draw_bars(axes, names, heads.match_divergences[order], "divergence of patterns")
    axes.set_xlim(0, 1)
    set_title(axes, f"matched heads, A → B ({shown_of(order, heads.match_divergences)})")


def draw_weights(axes: Axes, weights: WeightChanges) -> None:
    """The tensors that moved most for their size."""
    changes = np.nan_to_num(weights.relative_changes)
    order = np.argsort(-changes, kind="stable")[:MOST_BARS]
    names = [weights.tensors[number].removesuffix(".weight") for number in order]
    draw_bars(axes, names, changes[order], "relative change")
    axes.set_xlim(left=0)
    set_title(axes, f"weights ({shown_of(order, changes)})")


def draw_bars(axes: Axes, names: list[str], values: np.ndarray, what: str) -> None:
    axes.barh(range(len(names)), values, color=COLOURS[0])
    axes.invert_yaxis()
    axes.set_xlabel(what, fontsize=8)
    style_axes(axes)
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(names)), names, fontsize=6)
    style_text(*axes.get_yticklabels())


def shown_of(order: np.ndarray, values: np.ndarray) -> str:
    return "all" if len(order) == len(values) else f"{len(order)} of {len(values)} that differ most"
