"""The summary of a model as a picture: where its parameters are, and how large and how full its matrices are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lumiere.interpret.summary import ModelSummary
from lumiere.report.figures.heat_maps import add_scale, heat_map, label_columns, label_rows, set_title, write_cells
from lumiere.report.pictures import COLOURS, INK, Picture, new_figure, style_axes, style_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.3
"""Inches of a layer."""


def draw_summary(result: ModelSummary) -> Picture:
    """Parameters, ranks and sizes of the matrices, and what each part writes, where a text was at hand.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    num_layers = len(result.gain_names) // 2
    figure = new_figure(12.0, 2 * max(num_layers * ROW, 1.4) + 3.0)
    (parameter_axes, rank_axes), (write_axes, rms_axes) = figure.subplots(2, 2)
    draw_parameters(parameter_axes, result)
    kinds = list(dict.fromkeys(kind_of(name) for name in result.matrices if name.startswith("blocks.")))
    for axes, values, name, shown in (
        (
            rank_axes,
            result.effective_ranks / result.shapes.min(axis=1),
            "effective rank, share of the largest",
            "{:.0%}",
        ),
        (rms_axes, result.rms, "root mean square of the weights", "{:.3f}"),
    ):
        table = by_layer(result, values, kinds)
        image = heat_map(axes, table, low=0.0, high=1.0 if axes is rank_axes else None)
        label_rows(axes, [f"L{layer}" for layer in range(num_layers)])
        label_columns(axes, kinds)
        write_cells(axes, image, [["" if np.isnan(value) else shown.format(value) for value in row] for row in table])
        set_title(axes, name)
        add_scale(figure, image, axes, "share" if axes is rank_axes else "rms")
    if result.writes is None or result.head_writes is None:
        write_axes.remove()
    else:
        table = np.concatenate([result.writes, result.head_writes], axis=1)
        image = heat_map(write_axes, table, low=0.0)
        label_rows(write_axes, [f"L{layer}" for layer in range(num_layers)])
        names = ["attention", "feed-forward", *(f"H{head}" for head in range(result.head_writes.shape[1]))]
        label_columns(write_axes, names, rotation=90)
        write_cells(write_axes, image, [[f"{value:.0%}" for value in row] for row in table])
        set_title(write_axes, "what each part writes, as a share of the stream before it")
        add_scale(figure, image, write_axes, "share of the norm")
    caption = (
        "Where the parameters are, how full the matrices are (effective rank, Roy & Vetterli 2007) and how large, and "
        "how much each part adds to the residual stream."
    )
    return Picture(figure, "What is in the model", caption)


def draw_parameters(axes: Axes, result: ModelSummary) -> None:
    counts = {name.replace("_", " "): count for name, count in result.parameters.items() if count}
    rows, total = np.arange(len(counts)), sum(counts.values())
    axes.barh(rows, list(counts.values()), color=COLOURS[0], height=0.65)
    axes.invert_yaxis()
    axes.set_yticks(rows, list(counts), fontsize=8)
    axes.set_xlim(0, 1.3 * max(counts.values()))
    for row, count in enumerate(counts.values()):
        text = axes.text(count + 0.01 * total, row, f"{count:,} ({count / total:.0%})", va="center", fontsize=8)
        text.set_color(INK)
    style_axes(axes)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0, labelbottom=False)
    style_text(*axes.get_yticklabels())
    set_title(axes, f"{total:,} parameters")


def kind_of(matrix: str) -> str:
    """`query` of blocks.0.attention.query.weight."""
    return matrix.split(".")[-2]


def by_layer(result: ModelSummary, values: np.ndarray, kinds: list[str]) -> np.ndarray:
    """(L, kinds) the values of the blocks' matrices, NaN where a layer has none of a kind."""
    table = np.full((len(result.gain_names) // 2, len(kinds)), np.nan)
    for name, value in zip(result.matrices, values, strict=True):
        if name.startswith("blocks."):
            table[int(name.split(".")[1]), kinds.index(kind_of(name))] = value
    return table
