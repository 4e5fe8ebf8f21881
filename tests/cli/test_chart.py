"""Charts and sparklines, drawn by hand and by law."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumiere.cli.console import LEVELS, sparkline
from lumiere.cli.terminal_plots import AXIS_WIDTH, MIN_WIDTH, Curve, chart

AXIS = " " * (AXIS_WIDTH + 2)


def bare(text: str, colour: int) -> str:
    """The text without its colour."""
    return text


def test_letters_join_the_points_of_a_line() -> None:
    falling = Curve([(0, 4.0), (9, 1.0)], "a", 0)
    flat = Curve([(0, 1.0), (9, 1.0)], "B", 1, is_marked=True)
    assert chart([falling, flat], 10 + len(AXIS), 4, "{:g}".format, None) == [
        "         4 |aa",
        "           |  aaa",
        "           |     aaa",
        "         1 |B       aB",
        AXIS + "0        9",
    ]


def test_dots_are_two_by_four_in_a_character() -> None:
    """20 columns of dots fall over 4 rows: 4 of them in the first, 6, 6, and 4 in the last, as rounding gives them."""
    falling = Curve([(0, 1.0), (19, 0.0)], "a", 0)
    lines = chart([falling], 10 + len(AXIS), 1, "{:g}".format, bare)
    assert lines == ["         1 │⠉⠉⠒⠒⠒⠤⠤⠤⣀⣀", AXIS + "0       19"]


def test_a_steep_line_has_no_holes_and_colours_are_set_by_stretches() -> None:
    steep = Curve([(0, 0.0), (1, 7.0), (19, 7.0)], "a", 3)
    last = Curve([(19, 7.0)], "B", 5, is_marked=True)
    lines = chart([steep, last], 10 + len(AXIS), 2, "{:g}".format, lambda text, colour: f"<{colour}{text}>")
    assert [line.split("│")[1] for line in lines[:2]] == ["<3⢸⠉⠉⠉⠉⠉⠉⠉⠉><5●>", "<3⡸>"]


def test_the_mean_of_a_column_is_drawn() -> None:
    noisy = Curve([(0, 4.0), (0, 0.0), (9, 2.0)], "a", 0)
    spread = Curve([(0, 4.0), (0, 0.0)], "B", 1, is_marked=True)
    lines = chart([noisy, spread], 10 + len(AXIS), 5, "{:g}".format, None)
    assert [line[len(AXIS) :] for line in lines[:5]] == ["B", "", "aaaaaaaaaa", "", "B"]


numbers = st.floats(-1e17, 1e17, allow_nan=False)


@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30).map(sorted),
    st.integers(1, 100),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
)
def test_any_points_fit_into_the_width(
    points: list[tuple[float, float]], width: int, height: int, with_dots: bool, is_marked: bool
) -> None:
    lines = chart([Curve(points, "a", 0, is_marked)], width, height, lambda x: "x", bare if with_dots else None)
    assert len(lines) == height + 1
    assert max(map(len, lines)) <= max(width, MIN_WIDTH + len(AXIS))
    assert any(len(line) > len(AXIS) for line in lines[:height]), "something is drawn"


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([5], "▁"),
        ([2, 2], "▁▁"),
        (range(8), LEVELS),
        ([8, 4, 2, 1], "█▄▂▁"),
        ([-1e17, 1e17], "▁█"),
    ],
)
def test_a_sparkline_goes_from_the_lowest_to_the_highest(values: list[float], drawn: str) -> None:
    assert sparkline(values) == drawn
