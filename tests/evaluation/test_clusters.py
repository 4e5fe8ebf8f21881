"""Standard errors by document: the spread over corpora drawn anew, and the share of intervals that hold the truth."""

import math

import numpy as np
import pytest

from lumiere.evaluation.scoring import FEW_DOCUMENTS, clustered_means, half_width


def draw_corpus(draw: np.random.Generator, num_documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums (1, S), counts (S,) and documents (S,) of windows whose losses share the level of their document."""
    num_windows = draw.integers(2, 8, num_documents)
    documents = np.repeat(np.arange(num_documents), num_windows)
    counts = draw.integers(20, 65, len(documents))
    means = draw.normal(0, 0.3, num_documents)[documents] + draw.normal(0, 0.2, len(documents))
    return (means * counts)[None], counts, documents


def test_the_error_is_the_spread_over_corpora_drawn_anew() -> None:
    draw = np.random.default_rng(0)
    found = [clustered_means(*draw_corpus(draw, 60)) for _ in range(1000)]
    spread = np.std([mean for mean, _ in found])
    printed = np.sqrt(np.mean([error**2 for _, error in found]))
    assert printed == pytest.approx(spread, rel=0.08)
    by_window = []
    for _ in range(100):
        sums, counts, documents = draw_corpus(draw, 60)
        by_window.append(clustered_means(sums, counts, np.arange(len(documents)))[1])
    assert np.mean(by_window) < 0.65 * spread, "windows taken as independent give errors that are too small"


@pytest.mark.parametrize("num_documents", [4, 10, 40])
def test_intervals_contain_the_truth(num_documents: int) -> None:
    """Of 95 % intervals, by Student's t where documents are few; the truth is 0."""
    draw = np.random.default_rng(1)
    found = [clustered_means(*draw_corpus(draw, num_documents)) for _ in range(2000)]
    covered = np.mean([abs(mean[0]) <= half_width(num_documents) * error[0] for mean, error in found])
    assert covered == pytest.approx(0.95, abs=0.025)


def test_of_equal_documents_it_is_the_usual_error() -> None:
    sums, documents = np.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]), np.array([7, 1, 3])
    means, errors = clustered_means(10 * sums, np.array([10, 10, 10]), documents)
    np.testing.assert_allclose(means, [3.0, 5.0])
    np.testing.assert_allclose(errors, [sums[0].std(ddof=1) / np.sqrt(3), 0.0])
    means, errors = clustered_means(np.array([[20.0, 20.0, 60.0]]), np.array([20, 10, 10]), documents)
    np.testing.assert_allclose(means, [2.5])
    np.testing.assert_allclose(errors, [np.sqrt(3 / 2 * (30**2 + 5**2 + 35**2)) / 40])


def test_windows_of_a_document_belong_together_in_any_order() -> None:
    sums, counts, documents = draw_corpus(np.random.default_rng(2), 12)
    order = np.random.default_rng(3).permutation(len(counts))
    expected = clustered_means(sums, counts, documents)
    found = clustered_means(sums[:, order], counts[order], 1000 - documents[order])
    np.testing.assert_allclose(found, expected)


def test_one_document_has_no_error() -> None:
    _, errors = clustered_means(np.ones((2, 5)), np.ones(5), np.zeros(5))
    assert np.isnan(errors).all()


@pytest.mark.parametrize("num_documents", range(2, FEW_DOCUMENTS))
def test_few_documents_take_the_quantiles_of_students_t(num_documents: int) -> None:
    """Against the integral of its density, by the midpoint rule."""
    freedom, end = num_documents - 1, half_width(num_documents)
    points = (np.arange(200_000) + 0.5) * end / 200_000
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    inside = 2 * scale * ((1 + points**2 / freedom) ** (-(freedom + 1) / 2)).sum() * end / 200_000
    assert inside == pytest.approx(0.95, abs=1e-4)


def test_many_documents_take_the_normal_quantile() -> None:
    assert math.erf(half_width(FEW_DOCUMENTS) / math.sqrt(2)) == pytest.approx(0.95, abs=1e-4)
