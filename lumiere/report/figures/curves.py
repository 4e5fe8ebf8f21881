"""Loss curves as a picture: PNG, SVG, or one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.errors import LumiereError, nearest
from lumiere.persistence.metrics import History
from lumiere.report.figures.figure import (
    COLOURS,
    INK,
    LINE_STYLES,
    check_picture,
    new_figure,
    save_figure,
    style_axes,
    style_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lumiere.evaluation.detailed import DetailedEvaluation, LossByGroup


AXES: Mapping[str, str] = {"step": "step", "tokens": "tokens", "time": "seconds of training"}
LOSS_CAPTION = "Losses in nats a token. Thin: training, one batch a point. Bold with dots: validation."


@dataclass(frozen=True)
class LossCurves:
    """The losses of one run, and what they are called: the run and the corpus that they are over."""

    label: str
    history: History


def check_axis(axis: str) -> None:
    """Refuses an axis that is none of `AXES`."""
    if axis not in AXES:
        guess = nearest(axis, AXES)
        raise LumiereError(
            f"there is no axis {axis!a}", f"did you mean {guess}?" if guess else f"one of {', '.join(AXES)}"
        )


def save_loss_curves(path: Path, curves: Sequence[LossCurves], axis: str = "step") -> None:
    """Draws training and validation losses over `axis` and writes the picture atomically, by the path's suffix.

    Raises:
        LumiereError: the path or the axis will not do, matplotlib is not installed, or the file cannot be written.
    """
    check_picture(path)
    check_axis(axis)
    save_figure(path, draw_loss_curves(curves, axis), "Loss curves", LOSS_CAPTION)


def draw_loss_curves(curves: Sequence[LossCurves], axis: str) -> Figure:
    """The figure: for each run a thin training curve, and a bold validation curve with dots."""
    figure = new_figure(9, 5.5)
    axes = figure.add_subplot()
    for index, curve in enumerate(curves):
        draw_curves(
            axes, curve, axis, COLOURS[index % len(COLOURS)], LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        )
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("loss (nats a token)")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    style_axes(axes)
    style_text(*axes.legend(loc="upper right", frameon=False).get_texts())
    return figure


def draw_curves(axes: Axes, curve: LossCurves, axis: str, colour: str, style: str) -> None:
    training, validation = curve.history.training, curve.history.validation
    axes.plot(
        [getattr(point, axis) for point in training],
        [point.loss for point in training],
        color=colour,
        linestyle=style,
        linewidth=1.0,
        alpha=0.75,
        label=f"{curve.label}, training",
    )
    axes.plot(
        [getattr(point, axis) for point in validation],
        [point.loss for point in validation],
        color=colour,
        linestyle=style,
        linewidth=1.8,
        marker="o",
        markersize=3.5,
        label=f"{curve.label}, validation",
    )


LARGEST_DOT = 200
"""Area in square points of the dot of a bin that holds all tokens."""
SMALLEST_DOT = 4
EVALUATION_CAPTION = (
    "Losses in nats a token. Reliability: of the tokens that the model gave a probability, how often they were right; "
    "a dot's area is its share of the tokens, and on the dotted line they are right as often as the model says."
)


@dataclass(frozen=True)
class EvaluationPlot:
    """An evaluation, and what it is called: the run and its checkpoint."""

    label: str
    found: DetailedEvaluation


def save_evaluation_plots(path: Path, plots: Sequence[EvaluationPlot], text: str) -> None:
    """Draws the evaluations, each in its colour, and writes the picture by the path's suffix.

    Args:
        text: what was scored: a loss says nothing without what it is over.

    Raises:
        LumiereError: the path will not do, matplotlib is not installed, or the file cannot be written.
    """
    check_picture(path)
    save_figure(path, draw_evaluations(plots, text), "Evaluation", EVALUATION_CAPTION)


def draw_evaluations(plots: Sequence[EvaluationPlot], text: str) -> Figure:
    """The figure: two panels, or three where the training split was at hand."""
    has_frequency = any(plot.found.by_frequency is not None for plot in plots)
    figure = new_figure(15 if has_frequency else 10, 5)
    positions, *others = figure.subplots(1, 3 if has_frequency else 2)
    for index, plot in enumerate(plots):
        colour = COLOURS[index % len(COLOURS)]
        style = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        draw_positions(positions, plot, colour, style)
        if plot.found.by_frequency is not None:
            draw_frequencies(others[0], plot.found.by_frequency, colour, style)
        draw_reliability(others[-1], plot.found, colour, style)
    positions.set_xscale("log", base=2)
    positions.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    positions.set_title("Loss by position")
    positions.set_xlabel("tokens before it in the window")
    positions.set_ylabel("loss (nats a token)")
    if has_frequency:
        longest = max((p.found.by_frequency.names for p in plots if p.found.by_frequency is not None), key=len)
        others[0].set_xticks(range(len(longest)), [short_range(name) for name in longest])
        others[0].set_title("Loss by frequency")
        others[0].set_xlabel("the token's count in training")
        others[0].set_ylabel("loss (nats a token)")
    others[-1].plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    others[-1].set_title("Reliability")
    others[-1].set_xlabel("probability of the likeliest token")
    others[-1].set_ylabel("how often it was right")
    for axes in (positions, *others):
        style_axes(axes)
    for axes in (positions, others[-1]):
        style_text(*axes.legend(loc="best", frameon=False).get_texts())
    style_text(figure.suptitle(text))
    return figure


def draw_positions(axes: Axes, plot: EvaluationPlot, colour: str, style: str) -> None:
    losses = plot.found.by_position.losses
    axes.plot(range(1, len(losses) + 1), losses, color=colour, linestyle=style, linewidth=1.8, label=plot.label)


def draw_frequencies(axes: Axes, groups: LossByGroup, colour: str, style: str) -> None:
    seen = [index for index, count in enumerate(groups.counts) if count]
    losses = [groups.losses[index] for index in seen]
    axes.plot(seen, losses, color=colour, linestyle=style, linewidth=1.8, marker="o", markersize=5)


def draw_reliability(axes: Axes, found: DetailedEvaluation, colour: str, style: str) -> None:
    """A dot for each bin that is not empty."""
    table = found.calibration
    total = sum(table.counts)
    bins = [i for i, count in enumerate(table.counts) if count]
    confidences, accuracies = [table.confidences[i] for i in bins], [table.accuracies[i] for i in bins]
    label = f"ECE {table.ece:.2%}"
    axes.plot(confidences, accuracies, color=colour, linestyle=style, linewidth=1.2, label=label)
    areas = [max(SMALLEST_DOT, LARGEST_DOT * table.counts[i] / total) for i in bins]
    axes.scatter(confidences, accuracies, areas, color=colour)


def short_range(name: str) -> str:
    """`10,000 to 99,999` as `10K+`: eight of them stand side by side."""
    first, *rest = name.split(" to ")
    first = first.replace(",000", "K").replace("KK", "M")
    return f"{first}+" if rest else first
