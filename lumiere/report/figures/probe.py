"""Curves of probes by stage, and of sparse probes by size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lumiere.report.figures.figure import COLORS, INK, Picture, add_legend, label_axes, new_figure, style_axes

if TYPE_CHECKING:
    from lumiere.interpret.probe import Probe

CAPTION = (
    "Left: accuracy on test documents with its interval over documents; the control task gives each type a random "
    "class, and is measured on types seen in training. Right: probes that read a few coordinates of the chosen stage."
)


def draw_probe(result: Probe) -> Picture:
    """Draw the accuracy by stage, with baselines, and by the number of coordinates."""
    figure = new_figure(9.5, 4)
    by_stage, by_size = figure.subplots(1, 2)
    places = np.arange(len(result.stages))
    look = {"marker": "o", "markersize": 4, "linewidth": 1.8}
    by_stage.plot(places, result.accuracy, color=COLORS[0], label="accuracy", **look)
    if np.isfinite(result.accuracy_low).all():
        by_stage.fill_between(
            places, result.accuracy_low, result.accuracy_high, color=COLORS[0], alpha=0.25, linewidth=0
        )
    by_stage.plot(places, result.balanced_accuracy, color=COLORS[2], linestyle="--", label="balanced accuracy")
    by_stage.plot(places, result.control.mean(1), color=COLORS[1], linestyle="--", label="control task")
    by_stage.axhline(result.majority, color=INK, linewidth=0.8, linestyle=":", label="most frequent class")
    by_stage.set_xticks(places, result.stages)
    by_size.plot(result.sizes, result.sparse, color=COLORS[0], label="largest difference of means", **look)
    by_size.plot(result.sizes, result.random_sparse, color=COLORS[1], linestyle="--", label="random coordinates")
    by_size.axhline(result.accuracy[result.chosen], color=INK, linewidth=0.8, linestyle=":", label="all coordinates")
    by_size.set_xscale("log", base=2)
    by_size.set_xticks(result.sizes, [str(size) for size in result.sizes])
    label_axes(by_stage, result.subject, "stage", "test accuracy")
    label_axes(by_size, f"sparse probes of {result.stages[result.chosen]}", "coordinates", "test accuracy")
    for axes in (by_stage, by_size):
        style_axes(axes)
        add_legend(axes, fontsize=8)
    return Picture(figure, "Probe", CAPTION)
