"""Heat maps as pictures: which colour stands for what, and how tokens stand beside them, in one place.

Magnitudes are drawn in viridis, which rises evenly in lightness and can be read by colour-blind people and in grey
(Nuñez et al. 2018, "Optimizing colormaps with consideration for color vision deficiency"). Signed values are drawn from
red over white to blue (RdBu of ColorBrewer, Harrower & Brewer 2003), with white at zero and both ends equally far away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lumiere.report.labels import fitted
from lumiere.report.pictures import INK, style_axes, style_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Label = Callable[[int], str]
"""A token as it is printed."""

MAGNITUDES, SIGNED = "viridis", "RdBu"
POSITIVE, NEGATIVE = "#2166AC", "#B2182B"
"""Of bars: the ends of `SIGNED`."""
LARGEST_FONT, SMALLEST_FONT = 8.0, 4.5
POINTS = 72
"""Of an inch."""


def heat_map(
    axes: Axes, values: np.ndarray, *, low: float | None = None, high: float | None = None, is_signed: bool = False
) -> AxesImage:
    """The image of (rows, columns) numbers; what is no number stays empty.

    Args:
        low, high: the ends of the scale of a magnitude (None: those of the numbers).
        is_signed: on a scale that is centred at zero.
    """
    finite = values[np.isfinite(values)]
    if is_signed:
        high = float(np.abs(finite).max(initial=0)) or 1.0
        low = -high
    low = float(finite.min(initial=0)) if low is None else low
    high = float(finite.max(initial=low)) if high is None else high
    colours = SIGNED if is_signed else MAGNITUDES
    shown = np.ma.masked_invalid(values)
    # Not resampled, so that an SVG holds a pixel a cell, and the same bytes each time.
    image = axes.imshow(shown, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
    style_axes(axes)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def label_rows(axes: Axes, labels: Sequence[str], fontsize: float = LARGEST_FONT) -> None:
    axes.set_yticks(range(len(labels)), list(labels), fontsize=fontsize)
    style_text(*axes.get_yticklabels())


def label_columns(axes: Axes, labels: Sequence[str], fontsize: float = LARGEST_FONT, rotation: float = 0) -> None:
    axes.set_xticks(range(len(labels)), list(labels), fontsize=fontsize, rotation=rotation)
    style_text(*axes.get_xticklabels())


def fitting_font(inches: float, count: int) -> float | None:
    """The size in points at which `count` labels have room on so many inches; None where they have none."""
    size = min(LARGEST_FONT, 0.8 * inches * POINTS / count)
    return size if size >= SMALLEST_FONT else None


def label_tokens(axes: Axes, labels: Sequence[str], inches: float, *, on_rows: bool, on_columns: bool) -> None:
    """The tokens on both sides of a map; their positions where they would be too small to read."""
    size = fitting_font(inches, len(labels))
    if size is None:
        axes.tick_params(labelsize=LARGEST_FONT, labelleft=on_rows, labelbottom=on_columns)
        if on_rows:
            axes.set_ylabel("position", fontsize=LARGEST_FONT)
        if on_columns:
            axes.set_xlabel("position", fontsize=LARGEST_FONT)
        style_text(axes.xaxis.label, axes.yaxis.label)
        return
    shown = [fitted(label) for label in labels]
    label_rows(axes, shown if on_rows else [], size)
    label_columns(axes, shown if on_columns else [], size, rotation=90)


def write_cells(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]], fontsize: float = LARGEST_FONT) -> None:
    """A text in each cell, in black or white, whichever is easier to read on the cell's colour."""
    values = np.ma.asarray(image.get_array())
    colours = np.asarray(image.cmap(image.norm(values)))
    empty = np.ma.getmaskarray(values)
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if text:
                dark = colours[row, column, :3] @ (0.299, 0.587, 0.114) < 0.5 and not empty[row, column]
                colour = "white" if dark else INK if empty[row, column] else "black"
                written = axes.text(column, row, text, ha="center", va="center", fontsize=fontsize)
                style_text(written)
                written.set_color(colour)


def add_scale(figure: Figure, image: AxesImage, axes: Axes | Sequence[Axes], name: str) -> None:
    """The bar that says which colour is which number."""
    panels = axes if not isinstance(axes, Sequence) else list(axes)
    bar = figure.colorbar(image, ax=panels, label=name, shrink=0.8, aspect=30, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(colors=INK, labelsize=LARGEST_FONT)
    bar.ax.yaxis.label.set_fontsize(LARGEST_FONT)
    style_text(bar.ax.yaxis.label)


def set_title(axes: Axes, text: str, fontsize: float = 9) -> None:
    style_text(axes.set_title(text, fontsize=fontsize, loc="left"))
