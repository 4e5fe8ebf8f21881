"""A matrix of weights in colours: as squares, two of them above each other in a character where the text is long."""

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

from rich.text import Text

from lumiere.cli.console import color_support, stdout
from lumiere.cli.heatmap import LEGEND, column_headings, part
from lumiere.report.labels import LABEL_WIDTH, fitted

if TYPE_CHECKING:
    import numpy as np

# Viridis (van der Walt and Smith 2015), as the pictures have it: also read by the colour-blind, and in grey.
RAMP = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
TALLEST = 24
"""Rows that get a line each; of more, two share a line."""
THUMBNAIL_SIZE = 18


def color_of(weight: float) -> str:
    """The colour of a weight in [0, 1]: by its square root, so that small shares can be told apart."""
    place = sqrt(min(max(weight, 0.0), 1.0)) * (len(RAMP) - 1)
    lower = min(int(place), len(RAMP) - 2)
    share = place - lower
    mixed = (round(a + (b - a) * share) for a, b in zip(RAMP[lower], RAMP[lower + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def room(width: int) -> int:
    """Tokens that a map in a terminal of this width has room for."""
    return max(1, width - 2 * (LABEL_WIDTH + 1))


def color_map(weights: "np.ndarray", labels: Sequence[str], width: int) -> Text:
    """Rows look at columns; both carry their tokens, columns from top to bottom.

    Where two rows share a line, the label of the upper one stands on the left, that of the lower one on the right.

    Args:
        weights: (T, T), zero above the diagonal, which is left blank.
        labels: (T,) the tokens, as many as `room` has.
        width: of the terminal.
    """
    size = len(labels)
    cell_width = 2 if size <= TALLEST and LABEL_WIDTH + 1 + 2 * size <= width else 1
    text = Text(no_wrap=True)
    for line in column_headings(labels, cell_width):
        text.append(" " * (LABEL_WIDTH + 1) + line + "\n", style="dim")
    step = 1 if cell_width == 2 else 2
    for row in range(0, size, step):
        text.append(fitted(labels[row]).rjust(LABEL_WIDTH) + " ")
        if step == 1:
            for column in range(row + 1):
                text.append("██", style=color_of(float(weights[row, column])))
        else:
            text.append_text(half_blocks(weights[row : row + 2], row))
            if row + 1 < size:
                text.append(" " * (size - row - 1) + fitted(labels[row + 1]))
        text.append("\n")
    return text


def half_blocks(rows: "np.ndarray", first: int) -> Text:
    """One or two rows of a map in one line, the upper one in the upper half of each character.

    Args:
        rows: (1 or 2, T).
        first: the number of the first row; a row ends at its own column.
    """
    text = Text(no_wrap=True)
    for column in range(first + len(rows)):
        lower = color_of(float(rows[1, column])) if len(rows) == 2 else None
        if column > first:  # above the diagonal in the upper row
            text.append("▄", style=lower or "")
        else:
            upper = color_of(float(rows[0, column]))
            text.append("▀", style=f"{upper} on {lower}" if lower else upper)
    return text


def color_thumbnail(weights: "np.ndarray") -> list[Text]:
    """The shape of a matrix in half as many lines as columns: each square is the largest weight of its part.

    Args:
        weights: (T, T), zero above the diagonal; where it is smaller than the picture, squares repeat.
    """
    import numpy as np

    size = len(weights)
    parts = [part(number, THUMBNAIL_SIZE, size) for number in range(THUMBNAIL_SIZE)]
    small = np.array([[weights[slice(*rows), slice(*columns)].max() for columns in parts] for rows in parts])
    lines = [half_blocks(small[row : row + 2], row) for row in range(0, THUMBNAIL_SIZE, 2)]
    for line in lines:
        line.pad_right(THUMBNAIL_SIZE - len(line.plain))
    return lines


def show_legend(meaning: str) -> None:
    """What colours or characters stand for; where numbers are written, nothing."""
    if color_support() == "few":
        stdout().print(f"{meaning}: {LEGEND}")
    if color_support() != "many":
        return
    text = Text(f"{meaning}: ")
    for percent in (0, 2, 10, 25, 50, 100):
        text.append("██", style=color_of(percent / 100))
        text.append(f" {percent}%  ")
    text.rstrip()
    stdout().print(text)
