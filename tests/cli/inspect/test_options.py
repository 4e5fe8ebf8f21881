"""Lists of layers, heads and positions."""

import pytest

from lumiere.cli.inspect.options import parse_indices
from lumiere.errors import LumiereError


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("2", [2]),
        ("0-2", [0, 1, 2]),
        ("3,0", [3, 0]),
        ("4, 1-2 ,1", [4, 1, 2]),
        ("-1", [4]),
        ("-2--1", [3, 4]),
        ("3--1", [3, 4]),
    ],
)
def test_lists_and_ranges(text: str | None, indices: list[int]) -> None:
    assert parse_indices(text, 5, "layer") == indices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "there is no layer 5 .the layers are 0 to 4"),
        ("-6", "there is no layer -6"),
        ("0-9", "there is no layer 9"),
        ("3-1", "run backwards"),
        ("", "'' is no layer"),
        ("1,,2", "'' is no layer"),
        ("one", "'one' is no layer"),
        ("1-2-3", "'1-2-3' is no layer"),
        ("1.5", "'1.5' is no layer"),
    ],
)
def test_what_is_no_list(text: str, message: str) -> None:
    with pytest.raises(LumiereError, match=message):
        parse_indices(text, 5, "layer")


def test_the_only_one() -> None:
    with pytest.raises(LumiereError, match="the heads are 0"):
        parse_indices("1", 1, "head")
