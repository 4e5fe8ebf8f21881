"""Loss curves and evaluations: the figures hold the numbers, in three formats, readable on any page."""

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from lumiere.errors import LumiereError
from lumiere.evaluation.detailed import Calibration, DetailedEvaluation, LossByDocument, LossByGroup
from lumiere.evaluation.loss import Evaluation
from lumiere.evaluation.scoring import DocumentTotals
from lumiere.persistence.metrics import History, Point
from lumiere.report.figures.curves import (
    draw_evaluations,
    draw_loss_curves,
    save_evaluation_plots,
    save_loss_curves,
    short_range,
)
from lumiere.report.figures.figure import COLORS

HISTORY = History(
    training=tuple(Point(step, 100 * step, step / 4, 8 - step) for step in range(1, 5)),
    validation=(Point(2, 200, 0.5, 5.5), Point(4, 400, 1.0, 3.5)),
)
TEXT = "aaaaaaaa on $x$ <b>&amp;</b>"
CURVES = [(TEXT, HISTORY), ("bbbbbbbb on stories", HISTORY)]
NAN = float("nan")
FREQUENCIES = LossByGroup(["0", "1 to 9", "10 to 99", "100 to 999"], [NAN, 9.0, 6.0, 2.0], [0, 2, 3, 4])


def evaluation(by_frequency: LossByGroup | None) -> DetailedEvaluation:
    return DetailedEvaluation(
        evaluation=Evaluation(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1, 1, 1, seconds=1.0),
        byte_perplexity=2.0,
        normalized_share=0.0,
        accuracy=0.3,
        accuracy_at_5=0.6,
        calibration=Calibration(0.125, [0, 10, 30], [NAN, 0.4, 0.9], [NAN, 0.3, 0.95]),
        by_position=LossByGroup(["1", "2", "3", "4"], [5.0, 4.0, 3.5, 3.0], [1, 1, 1, 1]),
        by_frequency=by_frequency,
        by_document=LossByDocument([3.0], [1.0], [4], [9]),
        standard_errors=None,
        num_resamples=1000,
        seed=0,
        baselines=None,
        totals=DocumentTotals(*[np.zeros(1)] * 8),
    )


PLOTS = [("aaaaaaaa, best", evaluation(FREQUENCIES)), ("bbbbbbbb, best", evaluation(FREQUENCIES))]


def points(line: Any) -> list[list[float]]:
    return line.get_xydata().tolist()


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("axis", "unit"), [("step", 1), ("tokens", 100), ("time", 0.25)])
def test_loss_curves_hold_the_numbers(axis: str, unit: float) -> None:
    (axes,) = draw_loss_curves(CURVES, axis).axes
    training, validation, *others = axes.get_lines()
    assert len(others) == 2
    assert points(training) == [[unit * step, 8 - step] for step in range(1, 5)]
    assert points(validation) == [[unit * 2, 5.5], [unit * 4, 3.5]]


def test_twenty_runs_look_different() -> None:
    (axes,) = draw_loss_curves([(str(i), HISTORY) for i in range(20)], "step").axes
    looks = {(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in axes.get_lines()}
    assert len(looks) == 40
    assert {str(color) for color, _, _ in looks} == set(COLORS)


def test_evaluations_hold_the_numbers() -> None:
    figure = draw_evaluations(PLOTS, TEXT)
    positions, frequencies, reliability = figure.axes
    assert figure.get_suptitle() == TEXT
    assert legend(positions) == ["aaaaaaaa, best", "bbbbbbbb, best"]
    assert points(positions.get_lines()[0]) == [[1, 5], [2, 4], [3, 3.5], [4, 3]]
    # An empty group is omitted, and keeps its place.
    assert points(frequencies.get_lines()[1]) == [[1, 9], [2, 6], [3, 2]]
    assert [label.get_text() for label in frequencies.get_xticklabels()] == ["0", "1+", "10+", "100+"]
    first, _, diagonal = reliability.get_lines()
    assert (points(first), points(diagonal)) == ([[0.4, 0.3], [0.9, 0.95]], [[0, 0], [1, 1]])
    assert legend(reliability) == ["ECE 12.50%", "ECE 12.50%"]
    small, large = reliability.collections[0].get_sizes()  # pyright: ignore[reportAttributeAccessIssue]
    assert large == pytest.approx(3 * small), "areas are shares of the tokens"
    bare = ("a", evaluation(None))
    assert [len(draw_evaluations(plots, TEXT).axes) for plots in ([bare], [bare, PLOTS[0]])] == [2, 3]
    names = {"0": "0", "1 to 9": "1+", "10,000 to 99,999": "10K+", "1,000,000 to 9,999,999": "1M+"}
    assert {name: short_range(name) for name in names} == names


@pytest.mark.parametrize("kind", ["losses", "evaluations"])
def test_a_page_is_self_contained_and_takes_the_colors_of_the_reader(kind: str) -> None:
    if kind == "losses":
        save_loss_curves(Path("out.html"), CURVES)
    else:
        save_evaluation_plots(Path("out.html"), PLOTS, TEXT)
    text = Path("out.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", text)
    assert not re.search(r'(?:href|src)="(?!#)', text)
    assert "prefers-color-scheme: dark" in text
    assert "aaaaaaaa on $x$ &lt;b&gt;&amp;amp;&lt;/b&gt;" in text
    # Everything else has the color of the text, and there is no background.
    assert {color.upper() for color in re.findall(r"#[0-9a-fA-F]{6}\b", text)} == set(COLORS[:2])
    assert "currentColor" in text


def test_each_suffix_gives_its_format_and_equal_losses_equal_bytes() -> None:
    Path("loss.SVG").write_text("old")
    for name in ("loss.png", "loss.SVG", "again.svg"):
        save_loss_curves(Path(name), CURVES)
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert ElementTree.parse("loss.SVG").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert Path("loss.SVG").read_bytes() == Path("again.svg").read_bytes()
    assert len(list(Path().iterdir())) == 3, "no temporary file is left"


@pytest.mark.parametrize(
    ("name", "axis", "named"),
    [
        ("loss.gif", "step", "'loss.gif'"),
        ("loss", "step", "'loss'"),
        ("folder.png", "step", "'folder.png'"),
        ("none/loss.png", "step", "'none'"),
        ("loss.png", "tokns", "'tokns' .*tokens"),
        ("loss.png", "x", "'x' .*step, tokens, time"),
        ("no-matplotlib.png", "step", "pip install matplotlib"),
    ],
)
def test_bad_input_is_refused(name: str, axis: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("folder.png").mkdir()
    if "matplotlib" in name:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LumiereError, match=named):
        save_loss_curves(Path(name), CURVES, axis)
    assert [path.name for path in Path().iterdir()] == ["folder.png"]
