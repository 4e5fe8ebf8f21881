"""CKA and the divergence of patterns: their laws, and the formulas of the papers, spelled out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere.interpret.model_diff import LinearCka, pattern_divergences


def cka(x: np.ndarray, y: np.ndarray, num_parts: int = 3) -> float:
    sums = LinearCka()
    for first, second in zip(np.array_split(x, num_parts), np.array_split(y, num_parts), strict=True):
        sums.add([torch.from_numpy(first)], [torch.from_numpy(second)])
    return float(sums.similarities()[0, 0])


def by_grams(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the (N, N) matrices of all dot products, tr(KHLH)."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.integers(2, 6))
def test_cka_is_the_papers_and_does_not_see_rotations_scales_and_shifts(seed: int, scale: float, width: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(20, 5)), draw.normal(size=(20, width))
    expected = cka(x, y)
    assert expected == pytest.approx(by_grams(x, y))
    rotation = np.linalg.qr(draw.normal(size=(5, 5)))[0]
    assert cka(scale * x @ rotation + 1000, y) == pytest.approx(expected, rel=1e-6)
    assert cka(x, scale * x @ rotation) == pytest.approx(1)
    assert cka(y, x) == pytest.approx(expected)
    assert cka(x @ np.diag([1, 1, 1, 1, 50]), x) < 0.999
    assert cka(x, x) == 1


def test_cka_of_what_never_changes_is_not_known() -> None:
    assert np.isnan(cka(np.ones((9, 3)), np.random.default_rng(0).normal(size=(9, 3))))


def test_unrelated_representations_approach_zero_with_tokens() -> None:
    """As the docstring says, by (E + F) / N."""
    draw = np.random.default_rng(0)
    few, many = (cka(draw.normal(size=(n, 8)), draw.normal(size=(n, 8))) for n in (32, 3200))
    assert few > 0.15
    assert many == pytest.approx(0, abs=0.01)


def test_divergences_are_0_for_equal_and_1_for_disjoint_patterns() -> None:
    same = torch.rand(2, 2, 5, 5).softmax(-1)
    disjoint = torch.zeros(1, 2, 2, 4)
    disjoint[0, 0, :, 1], disjoint[0, 1, :, 2] = 1, 1
    counts = torch.ones(2, 5, dtype=torch.bool)
    assert np.diagonal(pattern_divergences(same, same.clone(), counts)).tolist() == [0, 0]
    for counts, total in ((torch.tensor([[True, True]]), 2), (torch.tensor([[True, False]]), 1)):
        found = pattern_divergences(disjoint, disjoint, counts)
        assert found == pytest.approx(np.array([[0, total], [total, 0]]))
