"""The map of tokens, held to the covariance matrix and to plain cosines."""

import numpy as np
import pytest

from lumiere.config.loader import validate
from lumiere.interpret.neurons import token_map
from lumiere.models.transformer import build_model
from lumiere.persistence.runs import Run

TOKENS = tuple(range(3, 60))


def test_the_map_keeps_the_directions_of_most_variance(trained_run: Run) -> None:
    model = trained_run.load_model()
    result = token_map(model, TOKENS)
    table = model.token_embedding.weight.detach().double().numpy()[list(TOKENS)]
    variances = np.linalg.eigvalsh(np.cov(table.T))[::-1]
    assert result.holds
    assert result.variances == pytest.approx(variances[:2] / variances.sum())
    assert result.points.var(axis=0, ddof=1) == pytest.approx(variances[:2])
    assert result.points.mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert result.points[:, 0] @ result.points[:, 1] == pytest.approx(0, abs=1e-9)


def test_neighbours_have_the_largest_cosines(trained_run: Run) -> None:
    model = trained_run.load_model()
    result = token_map(model, TOKENS, num_neighbours=4)
    table = model.token_embedding.weight.detach().double().numpy()[list(TOKENS)]
    table -= table.mean(axis=0)
    for row, token in enumerate(TOKENS):
        cosines = {
            other: table[row] @ vector / np.linalg.norm(table[row]) / np.linalg.norm(vector)
            for other, vector in zip(TOKENS, table, strict=True)
            if other != token
        }
        best = sorted(cosines, key=lambda other: -cosines[other])[:4]
        assert result.neighbours[row].tolist() == best
        assert result.cosines[row] == pytest.approx([cosines[other] for other in best])


def test_three_tokens_are_enough(trained_run: Run) -> None:
    result = token_map(trained_run.load_model(), (3, 4, 5))
    assert result.neighbours.shape == (3, 2)
    assert result.variances.sum() == pytest.approx(1)
    assert [row["token"] for row in result.rows()] == [3, 4, 5]


@pytest.mark.parametrize(("width", "num_tokens"), [(12, 1), (12, 2), (1, 5)])
def test_fewer_than_two_components_are_filled_with_zeros(width: int, num_tokens: int) -> None:
    sizes = {"embedding_size": width, "num_layers": 1, "num_heads": 1, "d_key": 2, "d_value": 2, "d_ff": 2}
    model = build_model(validate({"model": sizes, "tokenizer": {"vocab_size": 300}}))
    tokens = list(range(10, 10 + num_tokens))
    result = token_map(model, tokens)
    assert result.holds
    table = model.token_embedding.weight.detach().double().numpy()[tokens]
    distances = np.linalg.norm(table[:, None] - table, axis=-1)
    np.testing.assert_allclose(np.abs(result.points[:, None, 0] - result.points[:, 0]), distances, atol=1e-12)
    np.testing.assert_allclose(result.points[:, 1], 0, atol=1e-12)
    assert result.neighbours.shape == (num_tokens, min(5, num_tokens - 1))
