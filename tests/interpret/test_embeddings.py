"""The map of tokens, held to the covariance matrix and to plain cosines."""

import numpy as np
import pytest

from lumiere.interpret.embeddings import token_map
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
