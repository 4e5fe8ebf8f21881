"""Parameters by part, ranks worked out by hand, and rows compared one by one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere.config.loader import validate
from lumiere.interpret import summary as weights
from lumiere.interpret.summary import count_parts, matrix_facts, same_rows, spectrum_facts
from lumiere.models.transformer import build_model
from lumiere.training.costs import count_parameters


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_parts_are_what_the_config_says(positions: str) -> None:
    config = validate({"model": {"positions": positions, "d_value": 12, "d_ff": 24, "num_layers": 3}})
    model, expected = build_model(config), count_parameters(config)
    assert count_parts(model) == vars(expected)
    assert sum(count_parts(model).values()) == model.num_parameters == expected.total


@pytest.mark.parametrize(
    ("matrix", "stable", "effective"),
    [
        (np.outer([1.0, 2.0, 3.0], [4.0, 5.0]), 1, 1),
        (np.eye(5) * 7, 5, 5),
        (np.diag([2.0, 1.0, 1.0]), 6 / 4, math.exp(0.5 * math.log(2) + 0.5 * math.log(4))),
        (np.zeros((3, 2)), 0, 0),
    ],
)
def test_ranks_by_hand(matrix: np.ndarray, stable: float, effective: float) -> None:
    norm, rms, spectral, *ranks = spectrum_facts(matrix)
    assert ranks == pytest.approx([stable, effective])
    assert norm == pytest.approx(math.sqrt((matrix**2).sum()))
    assert rms == pytest.approx(math.sqrt((matrix**2).mean()))
    assert spectral == pytest.approx(np.linalg.norm(matrix, 2))


@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_ranks_know_neither_scale_nor_rotation(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(6, 4))
    rotation, _ = np.linalg.qr(generator.normal(size=(6, 6)))
    assert spectrum_facts(scale * rotation @ matrix)[3:] == pytest.approx(spectrum_facts(matrix)[3:])


def test_a_matrix_that_is_not_finite_has_no_sizes() -> None:
    assert np.isnan(spectrum_facts(np.array([[1.0, math.inf]]))).all()


def test_every_matrix_has_its_row() -> None:
    model = build_model(validate({"model": {"num_layers": 1}, "tokenizer": {"vocab_size": 300}}))
    facts = matrix_facts(model)
    assert dict(zip(facts.matrices, map(tuple, facts.shapes), strict=True)) == {
        name: tuple(value.shape) for name, value in model.state_dict().items() if value.ndim == 2
    }
    number = facts.matrices.index("blocks.0.feedforward.gate.weight")
    gate = model.blocks[0].feedforward.gate.weight.detach().double()
    assert facts.norms[number] == pytest.approx(float(gate.norm()))


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_same_rows_by_comparing_all(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "ROWS_AT_ONCE", rows_at_once)
    table = torch.randn(12, 5)
    table[7], table[9], table[4], table[11] = table[2] * 3, table[2] + 1e-4, -table[1], table[4]
    table[0] = table[5] = 0
    expected = []
    for row in range(12):
        cosines = [float(torch.cosine_similarity(table[row], table[other], dim=0)) for other in range(row)]
        expected += [(row, other) for other, cosine in enumerate(cosines) if cosine >= 0.999][:1]
    assert list(same_rows(table, 0.999)) == expected == [(7, 2), (9, 2), (11, 4)]
