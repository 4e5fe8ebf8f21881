"""The picture of the difference of two models: what it shows is what the result has."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lumiere.interpret.model_diff import ModelDiff, diff_models
from lumiere.report.figures.bars import MOST_DIFFERENT, draw_diff
from lumiere.report.figures.figure import save_picture
from tests.interpret.test_model_diff import BATCHES, nudged, random_model


@pytest.fixture
def result() -> ModelDiff:
    model = random_model()
    return diff_models(model, nudged(model), BATCHES)


def test_each_panel_has_the_numbers_of_the_result(result: ModelDiff) -> None:
    predictions, cka, heads, weights = draw_diff(result).figure.axes
    assert result.predictions is not None
    assert result.heads is not None
    assert result.cka is not None
    lines = {str(line.get_label()): line.get_ydata() for line in predictions.get_lines()}
    assert np.array_equal(np.asarray(lines["KL(A||B)"]), result.predictions.kl_ab_by_position)
    assert np.array_equal(np.asarray(lines["KL(B||A)"]), result.predictions.kl_ba_by_position)
    assert np.array_equal(np.asarray(cka.images[0].get_array()), result.cka)
    assert [text.get_text() for text in cka.texts] == [f"{value:.2f}" for value in result.cka.flatten()]
    for axes, values in ((heads, result.heads.match_divergences), (weights, result.weights.relative_changes)):
        widths = [bar.get_width() for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
        assert widths == sorted(values.tolist(), reverse=True)[:MOST_DIFFERENT]
    worst = int(result.heads.match_divergences.argmax())
    a, b = result.heads.matches[worst]
    assert heads.get_yticklabels()[0].get_text() == f"{result.heads.heads_a[a]} → {result.heads.heads_b[b]}"
    assert (
        weights.get_yticklabels()[0].get_text() + ".weight"
        == result.weights.tensors[int(result.weights.relative_changes.argmax())]
    )


def test_what_was_not_compared_has_no_panel(result: ModelDiff) -> None:
    (axes,) = draw_diff(replace(result, predictions=None, cka=None, heads=None)).figure.axes
    assert axes.get_xlabel() == "relative change"


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_it_is_written_in_every_form(result: ModelDiff, suffix: str) -> None:
    path = Path(f"out.{suffix}")
    save_picture(path, draw_diff(result), "two runs")
    assert path.stat().st_size > 1000
    model = random_model()
    save_picture(path, draw_diff(diff_models(model, deepcopy(model), BATCHES)), "one run twice")
