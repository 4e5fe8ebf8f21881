"""The heat map in colours: every weight in its place, two rows in a line."""

import numpy as np
import pytest
from rich.style import Style
from rich.text import Text

from lumiere.cli.terminal_plots import THUMBNAIL_SIZE, color_map, color_of, color_thumbnail, half_blocks, room
from lumiere.report.figures.figure import LABEL_WIDTH


def squares(line: Text) -> list[tuple[str | None, str | None]]:
    """The colours of the upper and the lower half of each character."""
    found = []
    for place, character in enumerate(line.plain):
        style = Style.combine(
            [Style.null(), *(Style.parse(str(s.style)) for s in line.spans if s.start <= place < s.end)]
        )
        ink = None if style.color is None else style.color.name
        ground = None if style.bgcolor is None else style.bgcolor.name
        halves = {"▀": (ink, ground), "▄": (ground, ink), "█": (ink, ink), " ": (None, None)}
        found.append(halves[character])
    return found


def test_colours_grow_lighter_with_the_weight() -> None:
    assert color_of(0) == color_of(-1) == "rgb(68,1,84)"
    assert color_of(1) == color_of(2) == "rgb(253,231,37)"
    assert color_of(0.25) == "rgb(33,144,141)"  # its root is the middle of the ramp
    colours = [color_of(weight).removeprefix("rgb(").removesuffix(")") for weight in np.linspace(0, 1, 20)]
    reds, greens, blues = np.array([[int(part) for part in colour.split(",")] for colour in colours]).T
    # Perceived lightness, ITU-R BT.709: what is left of the colours in grey.
    assert (np.diff(0.2126 * reds + 0.7152 * greens + 0.0722 * blues) > 0).all()


def test_two_rows_share_a_line() -> None:
    weights = np.array([[0.3, 0.7, 0], [0.01, 0.09, 0.9]])
    assert squares(half_blocks(weights, first=1)) == [
        (color_of(0.3), color_of(0.01)),
        (color_of(0.7), color_of(0.09)),
        (None, color_of(0.9)),
    ]
    assert squares(half_blocks(weights[:1], first=1)) == [(color_of(0.3), None), (color_of(0.7), None)]


@pytest.mark.parametrize("size", [1, 2, 24, 25, 40])
def test_each_weight_and_each_label_is_there(size: int) -> None:
    weights = np.tril(np.random.default_rng(size).random((size, size)))
    labels = [f"t{number}" for number in range(size)]
    width = 2 * (LABEL_WIDTH + 1) + size if size > 24 else 80
    assert size <= room(width)
    lines = color_map(weights, labels, width).split("\n")
    lines = [line for line in lines if any(character in line.plain for character in "▀▄█")]
    assert max(len(line.plain) for line in lines) <= width
    drawn = []
    for line in lines:
        picture = line[LABEL_WIDTH + 1 :]
        end = max(place for place, character in enumerate(picture.plain) if character in "▀▄█") + 1
        halves = squares(picture[:end])
        if size <= 24:
            drawn.append([upper for upper, _ in halves[::2]])
        else:
            drawn += [[upper for upper, _ in halves], [lower for _, lower in halves]]
    for row in range(size):
        assert [colour for colour in drawn[row] if colour] == [color_of(weights[row, c]) for c in range(row + 1)]
    assert [word for line in lines for word in line.plain.split() if word[0] == "t"] == labels


@pytest.mark.parametrize("size", [1, 2, 7, 18, 40])
def test_thumbnails_of_any_size_leave_no_weight_out(size: int) -> None:
    for row in range(size):
        for column in range(row + 1):
            weights = np.zeros((size, size))
            weights[row, column] = 1
            lines = color_thumbnail(weights)
            assert {len(line.plain) for line in lines} == {THUMBNAIL_SIZE}
            assert len(lines) == THUMBNAIL_SIZE // 2
            assert any(color_of(1) in halves for line in lines for halves in squares(line))
