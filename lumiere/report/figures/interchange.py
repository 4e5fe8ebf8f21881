"""The figure of interchange interventions: the accuracy of each method, a dot a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumiere.report.figures.bars import draw_bars
from lumiere.report.figures.figure import INK, Picture, new_figure

if TYPE_CHECKING:
    from lumiere.interpret.interchange import Interchange


def draw_interchange(result: Interchange) -> Picture:
    """Draw the mean accuracy of each method as a bar, and each seed as a dot."""
    figure = new_figure(7.0, 3.4)
    axes = figure.add_subplot()
    draw_bars(axes, result.methods, result.accuracies.mean(1), "interchange intervention accuracy")
    for row, accuracies in enumerate(result.accuracies):
        axes.plot(accuracies, [row] * len(accuracies), ".", color=INK, markersize=5)
    axes.axvline(1 / len(result.answers), color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.02)
    caption = (
        f"How often the prediction among {len(result.answers)} answers follows the source after a change of the stream "
        f"after block {result.layer} (Geiger et al. 2021, 2023); dots: seeds; dotted: chance. {result.rank} dimensions "
        "except for the whole stream."
    )
    return Picture(figure, "Interchange interventions", caption)
