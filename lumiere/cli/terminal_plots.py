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
# Viridis (van der Walt and Smith 2015), as in pictures: readable with color blindness and in gray.
RAMP = (
    *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141)),
    *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
)
HEADING_HEIGHT = 6
MAX_CELL_WIDTH = 3
TALLEST = 24
"""Up to this many rows have a line each in color; more share a line in pairs."""
THUMBNAIL_WIDTH = 18
THUMBNAIL_HEIGHT = THUMBNAIL_WIDTH // 2
"""Terminal characters are about twice as high as wide."""


def shade_of(weight: float) -> tuple[str, str]:
    """Return the character and the color of a weight in [0, 1]."""
    return next(((shade, style) for limit, shade, style in SHADES if weight < limit), FULL)


def color_of(weight: float) -> str:
    """Return the color of a weight in [0, 1], by its square root to separate small weights."""
    place = sqrt(min(max(weight, 0.0), 1.0)) * (len(RAMP) - 1)
    lower = min(int(place), len(RAMP) - 2)
    mixed = (round(a + (b - a) * (place - lower)) for a, b in zip(RAMP[lower], RAMP[lower + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def room(width: int, in_color: bool) -> int:
    """Return how many tokens a map fits in a terminal of this width."""
    return max(1, width - (2 if in_color else 1) * (LABEL_WIDTH + 1))


def heatmap(weights: "np.ndarray", labels: Sequence[str], width: int, in_color: bool = False) -> Text:
    """Draw attention of rows (queries) to columns (keys) in colors or shades, with vertical column labels.

    If two rows share a line, the upper one is labeled on the left, the lower one on the right.

    Args:
        weights: (T, T), zero above the diagonal, which stays blank.
        labels: (T,) tokens, at most `room(width, in_color)`.
        width: Terminal width; cells take one to three characters.
    """
    size, free = len(labels), width - LABEL_WIDTH - 1
    if in_color:
        cell_width = 2 if size <= TALLEST and 2 * size <= free else 1
    else:
        cell_width = max(1, min(MAX_CELL_WIDTH, free // size))
    text = Text(no_wrap=True)
    columns = [label[:HEADING_HEIGHT].rjust(HEADING_HEIGHT) for label in labels]
    for line in ("".join(characters) for characters in zip(*columns, strict=True)):
        if line.strip():
            spread = "".join(character.ljust(cell_width) for character in line).rstrip()
            text.append(" " * (LABEL_WIDTH + 1) + spread + "\n", style="dim")
    is_paired = in_color and cell_width == 1
    for row in range(0, size, 2 if is_paired else 1):
        text.append(fitted(labels[row]).rjust(LABEL_WIDTH) + " ")
        if is_paired:
            text.append_text(half_blocks(weights[row : row + 2], row))
            if row + 1 < size:
                text.append(" " * (size - row - 1) + fitted(labels[row + 1]))
        else:
            for weight in weights[row, : row + 1].tolist():
                character, style = (FULL[0], color_of(weight)) if in_color else shade_of(weight)
                text.append(character * cell_width, style=style)
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


def thumbnail(weights: "np.ndarray", in_color: bool = False) -> list[Text]:
    """Downsample a matrix to `THUMBNAIL_HEIGHT` lines by taking maxima; in color, a line has two rows.

    Args:
        weights: (T, T), zero above the diagonal; smaller matrices repeat characters.
    """
    import numpy as np

    def parts(count: int) -> list[tuple[int, int]]:
        """Return start and end of `count` parts of the tokens; each has at least one."""
        starts = [number * size // count for number in range(count)]
        return [(start, max(start + 1, (number + 1) * size // count)) for number, start in enumerate(starts)]

    size = len(weights)
    rows, columns = parts(THUMBNAIL_WIDTH if in_color else THUMBNAIL_HEIGHT), parts(THUMBNAIL_WIDTH)
    small = np.array([[weights[slice(*row), slice(*column)].max() for column in columns] for row in rows])
    lines = []
    for line in range(THUMBNAIL_HEIGHT):
        if in_color:
            text = half_blocks(small[2 * line : 2 * line + 2], 2 * line)
        else:
            shown = [
                value for value, (left, _) in zip(small[line].tolist(), columns, strict=True) if left < rows[line][1]
            ]
            text = Text(no_wrap=True).join(Text(*shade_of(value)) for value in shown)
        text.pad_right(THUMBNAIL_WIDTH - len(text.plain))
        lines.append(text)
    return lines


def show_legend(meaning: str) -> None:
    """Print a legend of colors or shades; nothing if maps are printed as numbers."""
    match color_support():
        case "few":
            stdout().print(f"{meaning}: {LEGEND}")
        case "many":
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
        is_labeled = row % ROWS_PER_LABEL == 0 or row == height - 1
        value = canvas.top + (canvas.bottom - canvas.top) * row / max(height - 1, 1)
        label = number(value, ".3g") if is_labeled else ""
        lines.append(f"{label:>{AXIS_WIDTH}} {'│' if paint else '|'}{canvas.line(row, paint)}")
    left, right = x_format(canvas.left), x_format(canvas.right)
    lines.append(" " * (AXIS_WIDTH + 2) + left + right.rjust(canvas.width - len(left)))
    return lines


class Canvas:
    """A grid of characters with the color of each, -1 for none; in braille a character has 2 x 4 dots."""

    def __init__(self, width: int, height: int, curves: Sequence[Curve], *, with_dots: bool) -> None:
        xs, ys = zip(*(point for curve in curves for point in curve.points), strict=True)
        self.width = width
        self.left, self.right, self.bottom, self.top = min(xs), max(xs), min(ys), max(ys)
        self._with_dots = with_dots
        self._columns, self._rows = (2 * width, 4 * height) if with_dots else (width, height)
        self._cells: list[list[tuple[str, int]]] = [[(" ", -1)] * width for _ in range(height)]

    def draw(self, curve: Curve) -> None:
        """Draw marks, or a line through the mean of each column."""
        if curve.is_marked:
            for x, y in curve.points:
                self._set(self._column(x), self._row(y), curve)
            return
        places = []
        for column, points in itertools.groupby(curve.points, key=lambda point: self._column(point[0])):
            ys = [y for _, y in points]
            places.append((column, self._row(sum(ys) / len(ys))))
        for column, row in places[:1]:
            self._set(column, row, curve)
        for (column, row), (next_column, next_row) in itertools.pairwise(places):
            distance = next_column - column
            for i in range(distance):
                begin = round(row + (next_row - row) * i / distance)
                end = round(row + (next_row - row) * (i + 1) / distance)
                for between in range(min(begin, end), max(begin, end) + 1):
                    if between != begin or begin == end:
                        self._set(column + i + 1, between, curve)

    def line(self, row: int, paint: Paint | None) -> str:
        """Return a row as text, painting each run of one color at once."""
        text = ""
        for color, cells in itertools.groupby(self._cells[row], key=lambda cell: cell[1]):
            run = "".join(character for character, _ in cells)
            text += paint(run, color) if paint and color >= 0 else run
        return text.rstrip()

    def _column(self, x: float) -> int:
        span = self.right - self.left
        return round((x - self.left) / span * (self._columns - 1)) if span else 0

    def _row(self, y: float) -> int:
        span = self.top - self.bottom
        return round((self.top - y) / span * (self._rows - 1)) if span else self._rows // 2

    def _set(self, column: int, row: int, curve: Curve) -> None:
        """Draw a letter, a mark or a dot. A cell has one color, that of the latest curve."""
        character = curve.letter
        if self._with_dots:
            bits, row, column = DOTS[row % 4][column % 2], row // 4, column // 2
            previous, color = self._cells[row][column]
            is_own = color == curve.color and ord(previous) >= BRAILLE
            character = "●" if curve.is_marked else chr((ord(previous) if is_own else BRAILLE) | bits)
        self._cells[row][column] = (character, curve.color)
