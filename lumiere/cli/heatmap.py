"""A matrix of weights as characters: readable at 80 columns, in 16 colours, and without any."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from lumiere.report.figures.figure import LABEL_WIDTH, fitted

if TYPE_CHECKING:
    import numpy as np

SHADES = ((0.02, "·", "bright_black"), (0.10, "░", "blue"), (0.25, "▒", "cyan"), (0.50, "▓", "yellow"))
FULL = ("█", "bright_white")
LEGEND = " ".join(f"{shade} <{limit:.0%}" for limit, shade, _ in SHADES) + f" {FULL[0]} more"
HEADING_HEIGHT = 6
MAX_CELL_WIDTH = 3
THUMBNAIL_WIDTH, THUMBNAIL_HEIGHT = 18, 9
"""A character of a terminal is about twice as high as it is wide."""


def heatmap(weights: "np.ndarray", labels: Sequence[str], width: int) -> Text:
    """Rows look at columns; both carry their tokens, columns from top to bottom.

    Args:
        weights: (T, T), zero above the diagonal, which is left blank.
        labels: (T,) the tokens.
        width: of the terminal; the cells take what it gives, one to three characters.
    """
    size = len(labels)
    cell_width = max(1, min(MAX_CELL_WIDTH, (width - LABEL_WIDTH - 1) // size))
    text = Text(no_wrap=True)
    for line in column_headings(labels, cell_width):
        text.append(" " * (LABEL_WIDTH + 1) + line + "\n", style="dim")
    for row in range(size):
        text.append(fitted(labels[row]).rjust(LABEL_WIDTH) + " ")
        for column in range(row + 1):
            shade, style = shade_of(float(weights[row, column]))
            text.append(shade * cell_width, style=style)
        text.append("\n")
    return text


def thumbnail(weights: "np.ndarray") -> list[Text]:
    """The shape of a matrix in `THUMBNAIL_HEIGHT` lines: each character is the largest weight of its part.

    Args:
        weights: (T, T), zero above the diagonal; where it is smaller than the picture, characters repeat.
    """
    size = len(weights)
    lines = []
    for line in range(THUMBNAIL_HEIGHT):
        first, last = part(line, THUMBNAIL_HEIGHT, size)
        text = Text(no_wrap=True)
        for place in range(THUMBNAIL_WIDTH):
            left, right = part(place, THUMBNAIL_WIDTH, size)
            if left >= last:  # all of it lies above the diagonal
                text.append(" ")
            else:
                shade, style = shade_of(float(weights[first:last, left:right].max()))
                text.append(shade, style=style)
        lines.append(text)
    return lines


def part(number: int, count: int, size: int) -> tuple[int, int]:
    """Where part `number` of `count` parts of `size` things begins and ends; it has one thing at least."""
    first = number * size // count
    return first, max(first + 1, (number + 1) * size // count)


def column_headings(labels: Sequence[str], cell_width: int) -> list[str]:
    """The labels written downwards, ending just above their columns."""
    columns = [label[:HEADING_HEIGHT].rjust(HEADING_HEIGHT) for label in labels]
    lines = ("".join(column[line].ljust(cell_width) for column in columns) for line in range(HEADING_HEIGHT))
    return [line.rstrip() for line in lines if line.strip()]


def shade_of(weight: float) -> tuple[str, str]:
    """The character and the colour of a weight in [0, 1]."""
    return next(((shade, style) for limit, shade, style in SHADES if weight < limit), FULL)
