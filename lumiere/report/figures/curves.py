"""Loss curves of runs, and evaluations by position, by token frequency and by confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lumiere.persistence.metrics import History
from lumiere.report.figures.figure import (
    COLORS,
    INK,
    LINE_STYLES,
    Picture,
    add_legend,
    new_figure,
    style_axes,
    style_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lumiere.evaluation.detailed import Calibration, DetailedEvaluation

AXES: Mapping[str, str] = {"step": "step", "tokens": "tokens", "time": "training time (s)"}
LOSS_CAPTION = "Loss in nats/token. Thin: training, one batch per point. Bold with dots: validation."
LOSS_LABEL = "loss (nats/token)"
LARGEST_DOT, SMALLEST_DOT = 200, 4
"""Area of a dot in square points: of a bin that holds all tokens, and at least."""
EVALUATION_CAPTION = (
    "Loss in nats/token. Reliability: accuracy of the most probable token by its predicted probability; the area of a "
    "dot is its share of the tokens, and the dotted line is perfect calibration."
)


def draw_loss_curves(curves: Sequence[tuple[str, History]], axis: str = "step") -> Picture:
    """Draw a thin training curve and a bold validation curve with dots for each run.

    Args:
        curves: losses of runs, each with a label that names the run and its corpus.
        axis: one of `AXES`.
    """
    figure = new_figure(9, 5.5)
    axes = figure.add_subplot()
    thin: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.75}
    bold: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
    for index, (label, history) in enumerate(curves):
        for kind, points, look in (("training", history.training, thin), ("validation", history.validation, bold)):
            x, y = [getattr(point, axis) for point in points], [point.loss for point in points]
            axes.plot(x, y, label=f"{label}, {kind}", **line_look(index), **look)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel(LOSS_LABEL)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    style_axes(axes)
    add_legend(axes, loc="upper right")
    return Picture(figure, "Loss curves", LOSS_CAPTION)


def line_look(index: int) -> dict[str, str]:
    """Color and line style of the curve with this number: all colors, then the next style."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]}


def draw_evaluations(plots: Sequence[tuple[str, DetailedEvaluation]], text: str) -> Picture:
    """Draw loss by position and reliability, and loss by frequency if the training split was available.

    Args:
        plots: evaluations, each with a label that names the run and its checkpoint.
        text: what was scored, as a title.
    """
    frequencies = [found.by_frequency.names for _, found in plots if found.by_frequency is not None]
    figure = new_figure(15 if frequencies else 10, 5)
    positions, *middle, reliability = figure.subplots(1, 3 if frequencies else 2)
    for index, (label, found) in enumerate(plots):
        look: dict[str, Any] = {**line_look(index), "linewidth": 1.8}
        losses = found.by_position.losses
        positions.plot(range(1, len(losses) + 1), losses, label=label, **look)
        if (groups := found.by_frequency) is not None:
            seen = [index for index, count in enumerate(groups.counts) if count]
            middle[0].plot(seen, [groups.losses[index] for index in seen], marker="o", markersize=5, **look)
        draw_reliability(reliability, found.calibration, **line_look(index))
    positions.set_xscale("log", base=2)
    positions.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    reliability.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    titles = [
        (positions, "Loss by position", "tokens before it in the window", LOSS_LABEL),
        (reliability, "Reliability", "probability of the most probable token", "accuracy"),
    ]
    if frequencies:
        longest = max(frequencies, key=len)
        middle[0].set_xticks(range(len(longest)), [short_range(name) for name in longest])
        titles.append((middle[0], "Loss by frequency", "occurrences in the training split", LOSS_LABEL))
    for axes, title, xlabel, ylabel in titles:
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        style_axes(axes)
    for axes in (positions, reliability):
        add_legend(axes, loc="best")
    style_text(figure.suptitle(text))
    return Picture(figure, "Evaluation", EVALUATION_CAPTION)


def draw_reliability(axes: Axes, table: Calibration, color: str, linestyle: str) -> None:
    """Draw a dot for each bin that is not empty."""
    total = sum(table.counts)
    bins = [i for i, count in enumerate(table.counts) if count]
    confidences, accuracies = [table.confidences[i] for i in bins], [table.accuracies[i] for i in bins]
    axes.plot(confidences, accuracies, color=color, linestyle=linestyle, linewidth=1.2, label=f"ECE {table.ece:.2%}")
    areas = [max(SMALLEST_DOT, LARGEST_DOT * table.counts[i] / total) for i in bins]
    axes.scatter(confidences, accuracies, areas, color=color)


def short_range(name: str) -> str:
    """`10,000 to 99,999` as `10K+`, because eight ranges stand side by side."""
    first, *rest = name.split(" to ")
    first = first.replace(",000", "K").replace("KK", "M")
    return f"{first}+" if rest else first
