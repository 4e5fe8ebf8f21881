"""The heat map: every weight in its place, also without colours."""

import numpy as np
import pytest

from lumiere.cli.terminal_plots import THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH, heatmap, shade_of, thumbnail
from lumiere.report.figures.figure import LABEL_WIDTH

WEIGHTS = np.array([[1.0, 0, 0], [0.3, 0.7, 0], [0.01, 0.09, 0.9]])
LABELS = ["<|sot|>", "·a", "·verylongtoken"]


def test_rows_and_columns_carry_their_tokens() -> None:
    lines = heatmap(WEIGHTS, LABELS, width=80).plain.splitlines()
    headings, rows = lines[:-3], lines[-3:]
    assert rows[0] == "     <|sot|> ███"
    assert rows[1] == "          ·a ▓▓▓███"
    assert rows[2] == "·verylongto… ···░░░███"
    for column, label in enumerate(LABELS):
        place = LABEL_WIDTH + 1 + 3 * column
        written = "".join(line.ljust(80)[place] for line in headings)
        assert written.strip() == label[: len(headings)]


@pytest.mark.parametrize(("width", "cell"), [(80, 3), (LABEL_WIDTH + 1 + 6, 2), (LABEL_WIDTH + 1 + 3, 1), (5, 1)])
def test_cells_fit_the_terminal(width: int, cell: int) -> None:
    last = heatmap(WEIGHTS, LABELS, width).plain.splitlines()[-1]
    assert len(last) == LABEL_WIDTH + 1 + 3 * cell


def test_shades_grow_with_the_weight() -> None:
    shades = [shade_of(weight)[0] for weight in (0, 0.02, 0.1, 0.25, 0.5, 1)]
    assert shades == ["·", "░", "▒", "▓", "█", "█"]


def test_thumbnails_show_the_largest_weight_of_each_part() -> None:
    """18 x 18 weights: a column is one of them, a line two."""
    weights = np.zeros((2 * THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH))
    weights[5, 3] = 0.6
    lines = [line.plain for line in thumbnail(weights)]
    assert len(lines) == THUMBNAIL_HEIGHT
    for number, line in enumerate(lines):
        shown = "".join("█" if (number, column) == (2, 3) else "·" for column in range(2 * number + 2))
        assert line == shown.ljust(THUMBNAIL_WIDTH)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_thumbnails_of_any_size_leave_no_weight_out(size: int) -> None:
    for row in range(size):
        for column in range(row + 1):
            weights = np.zeros((size, size))
            weights[row, column] = 1
            assert "█" in "".join(line.plain for line in thumbnail(weights))
