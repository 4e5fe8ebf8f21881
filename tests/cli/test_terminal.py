"""Heat maps, charts, sparklines, tables, numbers with units, and the progress bar: drawn by hand, or by law."""

import io
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.style import Style
from rich.text import Text

from lumiere.cli import console, progress
from lumiere.cli.console import LEVELS, scaled, short_time, sparkline
from lumiere.cli.progress import TrainingProgress
from lumiere.cli.terminal_plots import (
    AXIS_WIDTH,
    MIN_WIDTH,
    THUMBNAIL_HEIGHT,
    THUMBNAIL_WIDTH,
    Curve,
    chart,
    color_of,
    half_blocks,
    heatmap,
    room,
    shade_of,
    thumbnail,
)
from lumiere.report.figures.figure import LABEL_WIDTH
from lumiere.training.events import StartEvent, StepEvent

AXIS = " " * (AXIS_WIDTH + 2)
HALVES = "▀▄█"


def drawn(curves: list[Curve], height: int, color: str | None = None) -> list[str]:
    """The lines of a chart that is ten characters wide; with `color`, in dots."""
    paint = None if color is None else lambda text, index: color.format(text=text, index=index)
    return chart(curves, 10 + len(AXIS), height, "{:g}".format, paint)


def test_text_between_colons_is_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    console.stdout().print("a :fox:")
    assert capsys.readouterr().out == "a :fox:\n"


def test_letters_join_the_points_of_a_line() -> None:
    falling, flat = Curve([(0, 4.0), (9, 1.0)], "a", 0), Curve([(0, 1.0), (9, 1.0)], "B", 1, is_marked=True)
    lines = [
        "         4 |aa",
        "           |  aaa",
        "           |     aaa",
        "         1 |B       aB",
        AXIS + "0        9",
    ]
    assert drawn([falling, flat], 4) == lines


def test_dots_are_two_by_four_in_a_character() -> None:
    """20 columns of dots fall over 4 rows: 4 of them in the first, 6, 6, and 4 in the last, by rounding."""
    lines = drawn([Curve([(0, 1.0), (19, 0.0)], "a", 0)], 1, "{text}")
    assert lines == ["         1 │⠉⠉⠒⠒⠒⠤⠤⠤⣀⣀", AXIS + "0       19"]


def test_a_steep_line_has_no_holes_and_runs_of_a_color_are_painted_at_once() -> None:
    steep = Curve([(0, 0.0), (1, 7.0), (19, 7.0)], "a", 3)
    lines = drawn([steep, Curve([(19, 7.0)], "B", 5, is_marked=True)], 2, "<{index}{text}>")
    assert [line.split("│")[1] for line in lines[:2]] == ["<3⢸⠉⠉⠉⠉⠉⠉⠉⠉><5●>", "<3⡸>"]


def test_the_mean_of_a_column_is_drawn() -> None:
    noisy, spread = Curve([(0, 4.0), (0, 0.0), (9, 2.0)], "a", 0), Curve([(0, 4.0), (0, 0.0)], "B", 1, is_marked=True)
    assert [line[len(AXIS) :] for line in drawn([noisy, spread], 5)[:5]] == ["B", "", "aaaaaaaaaa", "", "B"]


NUMBERS = st.floats(-1e17, 1e17, allow_nan=False)
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30).map(sorted)


@given(POINTS, st.integers(1, 100), st.integers(1, 20), st.booleans(), st.booleans())
def test_any_points_fit_into_the_width(points: Any, width: int, height: int, with_dots: bool, is_marked: bool) -> None:
    paint = (lambda text, color: text) if with_dots else None
    lines = chart([Curve(points, "a", 0, is_marked)], width, height, lambda x: "x", paint)
    assert len(lines) == height + 1
    assert max(map(len, lines)) <= max(width, MIN_WIDTH + len(AXIS))
    assert any(len(line) > len(AXIS) for line in lines[:height]), "something is drawn"


@pytest.mark.parametrize(
    ("values", "scale", "expected"),
    [
        ([], (), ""),
        ([5], (), "▁"),
        (range(8), (), LEVELS),
        ([8, 4, 2, 1], (), "█▄▂▁"),
        ([-1e17, 1e17], (), "▁█"),
        ([0, 7], (0, 14), "▁▅"),  # half way rounds to an even level
        ([1, 1], (0, 1), "██"),
        ([math.nan, 0, 1, math.inf], (), " ▁█ "),
        ([math.nan], (), " "),
    ],
)
def test_a_sparkline_goes_from_the_lowest_to_the_highest(values: Any, scale: Any, expected: str) -> None:
    assert sparkline(values, *scale) == expected


WEIGHTS = np.array([[1.0, 0, 0], [0.3, 0.7, 0], [0.01, 0.09, 0.9]])
LABELS = ["<|sot|>", "·a", "·verylongtoken"]


def test_shaded_rows_and_columns_carry_their_tokens() -> None:
    lines = heatmap(WEIGHTS, LABELS, width=80).plain.splitlines()
    headings, rows = lines[:-3], lines[-3:]
    assert rows == ["     <|sot|> ███", "          ·a ▓▓▓███", "·verylongto… ···░░░███"]
    for column, label in enumerate(LABELS):
        written = "".join(line.ljust(80)[LABEL_WIDTH + 1 + 3 * column] for line in headings)
        assert written.strip() == label[: len(headings)]


@pytest.mark.parametrize(("width", "cell"), [(80, 3), (LABEL_WIDTH + 1 + 6, 2), (LABEL_WIDTH + 1 + 3, 1), (5, 1)])
def test_shaded_cells_fit_the_terminal(width: int, cell: int) -> None:
    assert len(heatmap(WEIGHTS, LABELS, width).plain.splitlines()[-1]) == LABEL_WIDTH + 1 + 3 * cell


def test_shades_and_colors_grow_lighter_with_the_weight() -> None:
    assert [shade_of(weight)[0] for weight in (0, 0.02, 0.1, 0.25, 0.5, 1)] == ["·", "░", "▒", "▓", "█", "█"]
    assert color_of(0) == color_of(-1) == "rgb(68,1,84)"
    assert color_of(1) == color_of(2) == "rgb(253,231,37)"
    assert color_of(0.25) == "rgb(33,144,141)"  # its root is the middle of the ramp
    colors = [color_of(weight).removeprefix("rgb(").removesuffix(")") for weight in np.linspace(0, 1, 20)]
    rgb = np.array([[int(part) for part in color.split(",")] for color in colors])
    lightness = rgb @ [0.2126, 0.7152, 0.0722]  # ITU-R BT.709: what is left of the colors in gray
    assert (np.diff(lightness) > 0).all()


def squares(line: Text) -> list[tuple[str | None, str | None]]:
    """The colors of the upper and the lower half of each character."""
    found = []
    for place, character in enumerate(line.plain):
        spans = (Style.parse(str(span.style)) for span in line.spans if span.start <= place < span.end)
        style = Style.combine([Style.null(), *spans])
        ink, ground = (color and color.name for color in (style.color, style.bgcolor))
        found.append({"▀": (ink, ground), "▄": (ground, ink), "█": (ink, ink), " ": (None, None)}[character])
    return found


def test_two_rows_share_a_line() -> None:
    upper, lower = [0.3, 0.7, 0], [0.01, 0.09, 0.9]
    pairs = [(color_of(0.3), color_of(0.01)), (color_of(0.7), color_of(0.09)), (None, color_of(0.9))]
    assert squares(half_blocks(np.array([upper, lower]), first=1)) == pairs
    assert squares(half_blocks(np.array([upper]), first=1)) == [(color, None) for color, _ in pairs[:2]]


@pytest.mark.parametrize("size", [1, 2, 24, 25, 40])
def test_each_weight_and_each_label_is_there_in_color(size: int) -> None:
    weights = np.tril(np.random.default_rng(size).random((size, size)))
    labels = [f"t{number}" for number in range(size)]
    width = 2 * (LABEL_WIDTH + 1) + size if size > 24 else 80
    assert size <= room(width, in_color=True)
    lines = [line for line in heatmap(weights, labels, width, True).split("\n") if set(HALVES) & set(line.plain)]
    assert max(len(line.plain) for line in lines) <= width
    rows = []
    for line in lines:
        picture = line[LABEL_WIDTH + 1 :]
        halves = squares(picture[: max(map(picture.plain.rfind, HALVES)) + 1])
        upper, lower = zip(*halves, strict=True)
        rows += [upper[::2]] if size <= 24 else [upper, lower]
    for row, weight in enumerate(weights):
        assert [color for color in rows[row] if color] == list(map(color_of, weight[: row + 1]))
    assert [word for line in lines for word in line.plain.split() if word[0] == "t"] == labels


@pytest.mark.parametrize("in_color", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 18, 23])
def test_thumbnails_of_any_size_leave_no_weight_out(size: int, in_color: bool) -> None:
    for row in range(size):
        for column in range(row + 1):
            weights = np.zeros((size, size))
            weights[row, column] = 1
            lines = thumbnail(weights, in_color)
            assert (len(lines), {len(line.plain) for line in lines}) == (THUMBNAIL_HEIGHT, {THUMBNAIL_WIDTH})
            if in_color:
                assert any(color_of(1) in halves for line in lines for halves in squares(line))
            else:
                assert "█" in "".join(line.plain for line in lines)


def test_a_shaded_thumbnail_shows_the_largest_weight_of_each_part() -> None:
    """18 x 18 weights: a column is one of them, a line two."""
    weights = np.zeros((2 * THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH))
    weights[5, 3] = 0.6
    for number, line in enumerate(thumbnail(weights)):
        shown = "".join("█" if (number, column) == (2, 3) else "·" for column in range(2 * number + 2))
        assert line.plain == shown.ljust(THUMBNAIL_WIDTH)


@pytest.mark.parametrize(
    ("is_terminal", "settings", "expected"),
    [
        (False, {}, "none"),
        (True, {"color_system": "truecolor"}, "many"),
        (True, {"color_system": "256"}, "many"),
        (True, {"color_system": "standard"}, "few"),
        (True, {"color_system": None}, "few"),
        (True, {"color_system": "truecolor", "no_color": True}, "few"),
    ],
)
def test_color_support(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, settings: Any, expected: str) -> None:
    stdout = Console(file=io.StringIO(), force_terminal=is_terminal, _environ={}, **settings)
    monkeypatch.setattr(console, "stdout", lambda: stdout)
    assert console.color_support() == expected


def test_numbers_with_their_units() -> None:
    numbers = (0, 7, 999, 1000, 4_756_000, 999_600, 1.457e11)
    assert list(map(scaled, numbers)) == ["0 ", "7 ", "999 ", "1 k", "4.76 M", "1 M", "146 G"]
    assert list(map(short_time, (0.0536, 4.39, 250))) == ["53.6 ms", "4.4 s", "250.0 s"]


@pytest.mark.parametrize(
    ("step", "total_steps", "loss", "speed", "figures"),
    [
        (10, 1600, 4.4184, 17_500.4, "loss 4.418  lr 3.0e-04  17,500 tok/s  41% mfu"),
        (444_499, 444_500, 10.9996, 1_234_567, "loss 11.000  lr 3.0e-04  1,234,567 tok/s  41% mfu"),
    ],
)
def test_the_progress_bar_fits_into_80_columns(
    monkeypatch: pytest.MonkeyPatch, step: int, total_steps: int, loss: float, speed: float, figures: str
) -> None:
    printed, bar = io.StringIO(), io.StringIO()
    terminal = Console(file=printed, force_terminal=True, width=80, soft_wrap=True, highlight=False)
    monkeypatch.setattr(progress, "stderr", lambda: terminal)
    display = TrainingProgress()
    display(StartEvent("run_a", 0, total_steps, 178, 1_188_992, 5_696, "cpu", "float32", 1.45e11))
    display(StepEvent(step, step / 178, 2000 * step, 0.1 * step, loss, 3e-4, 1.0, speed, 0.4149))
    Console(file=bar, width=80).print(display)
    (line,) = bar.getvalue().splitlines()
    assert f"{step}/{total_steps} {figures} " in line
    assert line.rstrip().endswith(":--"), "the remaining time is there in full"
    assert "float32 on cpu (peak 145 GFLOP/s)" in printed.getvalue()
