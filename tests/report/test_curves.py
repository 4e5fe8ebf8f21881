"""Loss curves and evaluations: the figures hold the numbers."""

from typing import Any

import numpy as np
import pytest

from lumiere.evaluation.detailed import Calibration, DetailedEvaluation, LossByDocument, LossByGroup
from lumiere.evaluation.loss import Evaluation
from lumiere.evaluation.scoring import DocumentTotals
from lumiere.persistence.metrics import History, Point
from lumiere.report.figures.curves import draw_evaluations, draw_loss_curves, short_range
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
    (axes,) = draw_loss_curves(CURVES, axis).figure.axes
    training, validation, *others = axes.get_lines()
    assert len(others) == 2
    assert points(training) == [[unit * step, 8 - step] for step in range(1, 5)]
    assert points(validation) == [[unit * 2, 5.5], [unit * 4, 3.5]]


def test_twenty_runs_look_different() -> None:
    (axes,) = draw_loss_curves([(str(i), HISTORY) for i in range(20)]).figure.axes
    looks = {(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in axes.get_lines()}
    assert len(looks) == 40
    assert {str(color) for color, _, _ in looks} == set(COLORS)


def test_evaluations_hold_the_numbers() -> None:
    figure = draw_evaluations(PLOTS, TEXT).figure
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
    assert [len(draw_evaluations(plots, TEXT).figure.axes) for plots in ([bare], [bare, PLOTS[0]])] == [2, 3]
    names = {"0": "0", "1 to 9": "1+", "10,000 to 99,999": "10K+", "1,000,000 to 9,999,999": "1M+"}
    assert {name: short_range(name) for name in names} == names
