"""Composition of heads: from whole matrices, on a circuit built by hand, and on random weights."""

import numpy as np
import pytest

from lumiere.interpret.head_scores import composition_scores, pair_list
from lumiere.models.transformer import Transformer
from tests.interpret.models import circuits, untrained_model


def test_scores_are_those_of_whole_matrices(model: Transformer) -> None:
    result = composition_scores(model)
    row = list(result.rows())[1]
    assert [row[name] for name in ("layer", "head", "later_layer", "later_head", "kind")] == [0, 0, 1, 0, "k"]
    assert (row["score"], row["chance"]) == (result.scores[0, 1], model.embedding_size**-0.5)
    for (layer, head, later_layer, later_head), scores in zip(result.pairs, result.scores, strict=True):
        assert layer < later_layer
        ov, (later_ov, later_qk) = circuits(model, layer, head)[0], circuits(model, later_layer, later_head)
        expected = [
            np.linalg.norm(ov @ later) / np.linalg.norm(ov) / np.linalg.norm(later)
            for later in (later_qk, later_qk.T, later_ov)
        ]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_pairs() -> None:
    assert pair_list(2, 2).tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert len(pair_list(4, 3)) == 9 * (3 + 2 + 1)
    single = composition_scores(untrained_model(num_layers=1, embedding_size=8))
    assert (single.scores.shape, single.holds) == ((0, 3), True)


def test_a_head_that_writes_nothing_has_no_score() -> None:
    result = composition_scores(untrained_model(num_layers=2, num_heads=2, zero_output_init=True))
    assert np.isnan(result.scores).all()
    assert result.holds


def test_random_weights_score_chance() -> None:
    result = composition_scores(
        untrained_model(300, embedding_size=128, num_layers=2, num_heads=4, d_key=32, d_value=32)
    )
    assert result.chance == pytest.approx(128**-0.5)
    np.testing.assert_allclose(result.scores / result.chance, 1, atol=0.1)
