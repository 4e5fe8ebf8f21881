"""The heat map: every weight in its place, also without colours."""

import numpy as np
import pytest

from lumiere.cli.heatmap import LABEL_WIDTH, heatmap, shade_of

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
