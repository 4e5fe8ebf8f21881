"""Loss curves as a picture: PNG, SVG, or one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.errors import LumiereError, nearest
from lumiere.persistence.metrics import History
from lumiere.report.pictures import (
    COLOURS,
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

AXES: Mapping[str, str] = {"step": "step", "tokens": "tokens", "time": "seconds of training"}
CAPTION = "Losses in nats a token. Thin: training, one batch a point. Bold with dots: validation."


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
    save_figure(path, draw(curves, axis), "Loss curves", CAPTION)


def draw(curves: Sequence[LossCurves], axis: str) -> Figure:
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
