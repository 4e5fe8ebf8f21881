"""Heat maps and line plots in a terminal.

Rich has no plots, and plotext keeps global state and colors files too. Heat maps use shades or colors, curves use
braille dots in colors or letters, so that nothing is lost without colors.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from rich.text import Text

from lumiere.cli.console import color_support, number, stdout
from lumiere.report.figures.figure import LABEL_WIDTH, fitted

if TYPE_CHECKING:
    import numpy as np


SHADES = ((0.02, "·", "bright_black"), (0.10, "░", "blue"), (0.25, "▒", "cyan"), (0.50, "▓", "yellow"))
FULL = ("█", "bright_white")
LEGEND = " ".join(f"{shade} <{limit:.0%}" for limit, shade, _ in SHADES) + f" {FULL[0]} more"
HEADING_HEIGHT = 6
MAX_CELL_WIDTH = 3
THUMBNAIL_WIDTH, THUMBNAIL_HEIGHT = 18, 9
"""Terminal characters are about twice as high as wide."""


def heatmap(weights: "np.ndarray", labels: Sequence[str], width: int) -> Text:
    """Draw attention of rows (queries) to columns (keys) in shades, with vertical column labels.

    Args:
        weights: (T, T), zero above the diagonal, which stays blank.
        labels: (T,) tokens.
        width: Terminal width; cells take one to three characters.
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
    """Downsample a matrix to `THUMBNAIL_HEIGHT` lines by taking maxima.

    Args:
        weights: (T, T), zero above the diagonal; smaller matrices repeat characters.
    """
    size = len(weights)
    lines = []
    for line in range(THUMBNAIL_HEIGHT):
        first, last = part(line, THUMBNAIL_HEIGHT, size)
        text = Text(no_wrap=True)
        for place in range(THUMBNAIL_WIDTH):
            left, right = part(place, THUMBNAIL_WIDTH, size)
            if left >= last:  # above the diagonal
                text.append(" ")
            else:
                shade, style = shade_of(float(weights[first:last, left:right].max()))
                text.append(shade, style=style)
        lines.append(text)
    return lines


def part(number: int, count: int, size: int) -> tuple[int, int]:
    """Return start and end of part `number` of `count` of `size` items; at least one item."""
    first = number * size // count
    return first, max(first + 1, (number + 1) * size // count)


def column_headings(labels: Sequence[str], cell_width: int) -> list[str]:
    """Write labels vertically, bottom-aligned."""
    columns = [label[:HEADING_HEIGHT].rjust(HEADING_HEIGHT) for label in labels]
    lines = ("".join(column[line].ljust(cell_width) for column in columns) for line in range(HEADING_HEIGHT))
    return [line.rstrip() for line in lines if line.strip()]


def shade_of(weight: float) -> tuple[str, str]:
    """Return the character and the color of a weight in [0, 1]."""
    return next(((shade, style) for limit, shade, style in SHADES if weight < limit), FULL)


# Viridis (van der Walt and Smith 2015), as in pictures: readable with color blindness and in gray.
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
"""Up to this many rows have a line each; more share a line in pairs."""
THUMBNAIL_SIZE = 18


def color_of(weight: float) -> str:
    """Return the color of a weight in [0, 1], by its square root to separate small weights."""
    place = sqrt(min(max(weight, 0.0), 1.0)) * (len(RAMP) - 1)
    lower = min(int(place), len(RAMP) - 2)
    share = place - lower
    mixed = (round(a + (b - a) * share) for a, b in zip(RAMP[lower], RAMP[lower + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def room(width: int) -> int:
    """Return how many tokens a map fits in a terminal of this width."""
    return max(1, width - 2 * (LABEL_WIDTH + 1))


def color_map(weights: "np.ndarray", labels: Sequence[str], width: int) -> Text:
    """Draw attention of rows (queries) to columns (keys) in colors, with vertical column labels.

    If two rows share a line, the upper one is labeled on the left, the lower one on the right.

    Args:
        weights: (T, T), zero above the diagonal, which stays blank.
        labels: (T,) tokens, at most `room(width)`.
        width: Terminal width.
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
    """Draw one or two rows in a line, the upper one in the upper half of each character.

    Args:
        rows: (1 or 2, T).
        first: Index of the first row; a row ends at the diagonal.
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
    """Downsample a matrix to colored squares by taking maxima, two rows a line.

    Args:
        weights: (T, T), zero above the diagonal; smaller matrices repeat squares.
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
    """Print a legend of colors or shades; nothing if maps are printed as numbers."""
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


Points = Sequence[tuple[float, float]]
Paint = Callable[[str, int], str]

BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column in a cell
AXIS_WIDTH = 10  # -1.23e-308
MIN_WIDTH = 10
ROWS_PER_LABEL = 4


@dataclass(frozen=True)
class Curve:
    """A curve.

    Attributes:
        points: (x, y) with rising x.
        letter: Drawn instead of dots without colors.
        color: Index of the color, for `paint`.
        is_marked: Draw separate marks instead of a line.
    """

    points: Points
    letter: str
    color: int
    is_marked: bool = False


def chart(
    curves: Sequence[Curve], width: int, height: int, x_format: Callable[[float], str], paint: Paint | None
) -> list[str]:
    """Plot curves on common axes, as lines of at most `width` characters.

    Points of a line that share a column are averaged. Later curves are drawn over earlier ones.

    Args:
        curves: At least one has points.
        x_format: Formats the two ends of the x-axis.
        paint: Colors a text by color index and enables braille; None for letters.
    """
    canvas = Canvas(max(MIN_WIDTH, width - AXIS_WIDTH - 2), height, curves, with_dots=paint is not None)
    for curve in curves:
        canvas.draw(curve)
    lines = []
    for row in range(height):
        is_labelled = row % ROWS_PER_LABEL == 0 or row == height - 1
        label = number(canvas.value_of(row), ".3g") if is_labelled else ""
        lines.append(f"{label:>{AXIS_WIDTH}} {'│' if paint else '|'}{canvas.line(row, paint)}")
    left, right = x_format(canvas.left), x_format(canvas.right)
    lines.append(" " * (AXIS_WIDTH + 2) + left + right.rjust(canvas.width - len(left)))
    return lines


class Canvas:
    """A grid of characters, each of 2 x 4 dots in braille."""

    def __init__(self, width: int, height: int, curves: Sequence[Curve], *, with_dots: bool) -> None:
        xs = [x for curve in curves for x, _ in curve.points]
        ys = [y for curve in curves for _, y in curve.points]
        self.width, self.height = width, height
        self.left, self.right, self.bottom, self.top = min(xs), max(xs), min(ys), max(ys)
        self._with_dots = with_dots
        self._columns, self._rows = (2 * width, 4 * height) if with_dots else (width, height)
        self._cells: list[list[tuple[str, int]]] = [[(" ", -1)] * width for _ in range(height)]

    def draw(self, curve: Curve) -> None:
        """Draw marks, or a line through the mean of each column."""
        if curve.is_marked:
            for x, y in curve.points:
                self._mark(self._column(x), self._row(y), curve)
            return
        sums: dict[int, tuple[float, int]] = {}
        for x, y in curve.points:
            total, count = sums.get(self._column(x), (0.0, 0))
            sums[self._column(x)] = (total + y, count + 1)
        places = [(column, self._row(total / count)) for column, (total, count) in sorted(sums.items())]
        for column, row in places[:1]:
            self._dot(column, row, curve)
        for (column, row), (next_column, next_row) in itertools.pairwise(places):
            distance = next_column - column
            for i in range(distance):
                begin = round(row + (next_row - row) * i / distance)
                end = round(row + (next_row - row) * (i + 1) / distance)
                for between in range(min(begin, end), max(begin, end) + 1):
                    if between != begin or begin == end:
                        self._dot(column + i + 1, between, curve)

    def value_of(self, row: int) -> float:
        """Return the y in the middle of a row."""
        share = row / max(self.height - 1, 1)
        return self.top + (self.bottom - self.top) * share

    def line(self, row: int, paint: Paint | None) -> str:
        """Return a row as text, painting each run of one color at once."""
        text, stretch, color = "", "", -1
        for character, owner in [*self._cells[row], ("", -2)]:
            if owner != color:
                text += paint(stretch, color) if paint and color >= 0 else stretch
                stretch, color = "", owner
            stretch += character
        return text.rstrip()

    def _column(self, x: float) -> int:
        span = self.right - self.left
        return round((x - self.left) / span * (self._columns - 1)) if span else 0

    def _row(self, y: float) -> int:
        span = self.top - self.bottom
        return round((self.top - y) / span * (self._rows - 1)) if span else self._rows // 2

    def _dot(self, column: int, row: int, curve: Curve) -> None:
        if not self._with_dots:
            self._cells[row][column] = (curve.letter, curve.color)
            return
        cell_row, cell_column = row // 4, column // 2
        character, owner = self._cells[cell_row][cell_column]
        # A cell has one color, that of the later curve.
        is_own = owner == curve.color and ord(character) >= BRAILLE
        bits = (ord(character) if is_own else BRAILLE) | DOTS[row % 4][column % 2]
        self._cells[cell_row][cell_column] = (chr(bits), curve.color)

    def _mark(self, column: int, row: int, curve: Curve) -> None:
        if self._with_dots:
            self._cells[row // 4][column // 2] = ("●", curve.color)
        else:
            self._cells[row][column] = (curve.letter, curve.color)
