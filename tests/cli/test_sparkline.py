"""Curves in a line of text."""

import math

from lumiere.cli.console import sparkline


def test_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([]) == ""


def test_a_scale_that_is_shared() -> None:
    assert sparkline([0, 7], 0, 14) == "▁▅"  # half way rounds to an even level
    assert sparkline([1, 1], 0, 1) == "██"


def test_what_is_no_number_is_a_space() -> None:
    assert sparkline([math.nan, 0, 1, math.inf]) == " ▁█ "
    assert sparkline([math.nan]) == " "
