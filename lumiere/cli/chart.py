"""Curves in a terminal.

Our own and not a plotting library's: Rich draws none, and plotext keeps its figure in a global and sets colours also
where the output goes to a file. Here a curve is braille dots in a colour of its own where there are colours, and
letters where there are none, so that nothing is lost in a pipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lumiere.cli.runs.cells import number

Points = Sequence[tuple[float, float]]
Paint = Callable[[str, int], str]

BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column in a cell
LABEL_WIDTH = 10  # -1.23e-308
MIN_WIDTH = 10
ROWS_PER_LABEL = 4


@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        points: (x, y) with rising x.
        letter: what draws it where there are no colours.
        colour: index of its colour, which `paint` knows.
        is_marked: whether each point is a mark of its own, joined by nothing.
    """

    points: Points
    letter: str
    colour: int
    is_marked: bool = False


def chart(
    curves: Sequence[Curve], width: int, height: int, x_format: Callable[[float], str], paint: Paint | None
) -> list[str]:
    """The curves on common axes, as lines of at most `width` characters.

    Where many points of a line share a column, their mean is drawn.

    Args:
        curves: at least one has points. Later ones lie above earlier ones.
        x_format: writes the two ends of the x-axis.
        paint: gives a text the colour of a number, with braille; None for letters alone.
    """
    canvas = Canvas(max(MIN_WIDTH, width - LABEL_WIDTH - 2), height, curves, with_dots=paint is not None)
    for curve in curves:
        canvas.draw(curve)
    lines = []
    for row in range(height):
        is_labelled = row % ROWS_PER_LABEL == 0 or row == height - 1
        label = number(canvas.value_of(row), ".3g") if is_labelled else ""
        lines.append(f"{label:>{LABEL_WIDTH}} {'│' if paint else '|'}{canvas.line(row, paint)}")
    left, right = x_format(canvas.left), x_format(canvas.right)
    lines.append(" " * (LABEL_WIDTH + 2) + left + right.rjust(canvas.width - len(left)))
    return lines


class Canvas:
    """A grid of characters, each 2 x 4 dots where there are dots."""

    def __init__(self, width: int, height: int, curves: Sequence[Curve], *, with_dots: bool) -> None:
        xs = [x for curve in curves for x, _ in curve.points]
        ys = [y for curve in curves for _, y in curve.points]
        self.width, self.height = width, height
        self.left, self.right, self.bottom, self.top = min(xs), max(xs), min(ys), max(ys)
        self._with_dots = with_dots
        self._columns, self._rows = (2 * width, 4 * height) if with_dots else (width, height)
        self._cells: list[list[tuple[str, int]]] = [[(" ", -1)] * width for _ in range(height)]

    def draw(self, curve: Curve) -> None:
        """Its marks, or its line: the mean of each column, joined to the next."""
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
        """The y in the middle of a row of characters."""
        share = row / max(self.height - 1, 1)
        return self.top + (self.bottom - self.top) * share

    def line(self, row: int, paint: Paint | None) -> str:
        """A row as text, each stretch of one colour painted at once."""
        text, stretch, colour = "", "", -1
        for character, owner in [*self._cells[row], ("", -2)]:
            if owner != colour:
                text += paint(stretch, colour) if paint and colour >= 0 else stretch
                stretch, colour = "", owner
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
            self._cells[row][column] = (curve.letter, curve.colour)
            return
        cell_row, cell_column = row // 4, column // 2
        character, owner = self._cells[cell_row][cell_column]
        # A cell has one colour: the later curve takes it.
        is_own = owner == curve.colour and ord(character) >= BRAILLE
        bits = (ord(character) if is_own else BRAILLE) | DOTS[row % 4][column % 2]
        self._cells[cell_row][cell_column] = (chr(bits), curve.colour)

    def _mark(self, column: int, row: int, curve: Curve) -> None:
        if self._with_dots:
            self._cells[row // 4][column // 2] = ("●", curve.colour)
        else:
            self._cells[row][column] = (curve.letter, curve.colour)
