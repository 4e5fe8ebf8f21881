"""Pictures of evaluations: the numbers are in them, and text from files is only text."""

import re
from pathlib import Path

import numpy as np
import pytest

from lumiere.evaluation.detailed import Calibration, DetailedEvaluation, LossByDocument, LossByGroup
from lumiere.evaluation.loss import Evaluation
from lumiere.evaluation.scoring import DocumentTotals
from lumiere.report.figures.curves import EvaluationPlot, draw_evaluations, save_evaluation_plots, short_range
from lumiere.report.figures.figure import COLOURS

NAN = float("nan")
TEXT = "$x$ <b>&amp;</b> test (55f2337b)"


def make_plot(label: str, by_frequency: LossByGroup | None) -> EvaluationPlot:
    empty = np.zeros(1)
    return EvaluationPlot(
        label,
        DetailedEvaluation(
            evaluation=Evaluation(*[1.0] * 6, *[1] * 4, seconds=1.0),
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
            totals=DocumentTotals(*[empty] * 8),
        ),
    )


FREQUENCIES = LossByGroup(["0", "1 to 9", "10 to 99", "100 to 999"], [NAN, 9.0, 6.0, 2.0], [0, 2, 3, 4])
PLOTS = [make_plot("aaaaaaaa, best", FREQUENCIES), make_plot("bbbbbbbb, best", FREQUENCIES)]


def test_the_figure_holds_the_numbers() -> None:
    figure = draw_evaluations(PLOTS, TEXT)
    positions, frequencies, reliability = figure.axes
    assert figure.get_suptitle() == TEXT
    assert [text.get_text() for text in positions.get_legend().get_texts()] == ["aaaaaaaa, best", "bbbbbbbb, best"]
    assert positions.get_lines()[0].get_xydata().tolist() == [[1, 5], [2, 4], [3, 3.5], [4, 3]]  # pyright: ignore
    # An empty group is left out, and keeps its place.
    assert frequencies.get_lines()[1].get_xydata().tolist() == [[1, 9], [2, 6], [3, 2]]  # pyright: ignore
    assert [label.get_text() for label in frequencies.get_xticklabels()] == ["0", "1+", "10+", "100+"]
    first, _, diagonal = reliability.get_lines()
    assert first.get_xydata().tolist() == [[0.4, 0.3], [0.9, 0.95]]  # pyright: ignore
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]  # pyright: ignore
    assert [text.get_text() for text in reliability.get_legend().get_texts()] == ["ECE 12.50%", "ECE 12.50%"]
    dots, _ = reliability.collections
    small, large = dots.get_sizes()  # pyright: ignore
    assert large == pytest.approx(3 * small), "areas are shares of the tokens"


def test_without_the_training_split_there_is_no_panel_of_frequencies() -> None:
    assert [axes.get_title() for axes in draw_evaluations([make_plot("a", None)], TEXT).axes] == [
        "Loss by position",
        "Reliability",
    ]
    assert len(draw_evaluations([make_plot("a", None), PLOTS[0]], TEXT).axes) == 3


def test_ranges_are_short() -> None:
    names = {
        "0": "0",
        "1 to 9": "1+",
        "100 to 999": "100+",
        "10,000 to 99,999": "10K+",
        "1,000,000 to 9,999,999": "1M+",
    }
    assert {name: short_range(name) for name in names} == names


def test_the_page_needs_nothing_else_and_shows_text_as_it_is(tmp_path: Path) -> None:
    save_evaluation_plots(tmp_path / "eval.html", PLOTS, TEXT)
    text = (tmp_path / "eval.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", text)
    assert "$x$ &lt;b&gt;&amp;amp;&lt;/b&gt; test (55f2337b)" in text
    colours = {colour.upper() for colour in re.findall(r"#[0-9a-fA-F]{6}\b", text)}
    assert colours == set(COLOURS[:2]), "all else has the colour of the text, and there is no background"
