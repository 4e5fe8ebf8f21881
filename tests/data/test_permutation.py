"""The order of an epoch: a permutation for every size that never changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumiere.data.batches import feistel, permute

# Resumed runs and recorded losses depend on these: never change them.
GOLDEN = {
    (10, "0 0"): [3, 7, 4, 6, 5, 2, 1, 0],
    (10, "0 1"): [0, 6, 4, 3, 1, 2, 5, 8],
    (53_670, "0 0"): [52173, 51882, 45789, 910, 46292, 25781, 46062, 23229],
    (10**12, "7 3"): [657384593340, 865850386719, 145433095008, 54084213675, 386188078171, 173749760235],
}


def order(size: int, key: str) -> list[int]:
    return permute(np.arange(size), size, key).tolist()


@pytest.mark.parametrize(("size", "key"), GOLDEN)
def test_golden(size: int, key: str) -> None:
    expected = GOLDEN[size, key]
    assert permute(np.arange(len(expected)), size, key).tolist() == expected


def test_every_size_is_permuted() -> None:
    assert permute(np.arange(0), 5, "0 0").tolist() == []
    for size in [*range(1, 201), 1023, 1024, 1025, 4096, 4097, 53_670, 65_536, 65_537, 300_000]:
        images = permute(np.arange(size), size, "1 2")
        assert images.dtype == np.int64
        assert np.array_equal(np.sort(images), np.arange(size))


@given(st.integers(1, 2**62), st.text(max_size=5), st.data())
def test_the_image_of_an_index_does_not_depend_on_the_others(size: int, key: str, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8, unique=True)))
    images = permute(indices, size, key)
    assert [int(permute(indices[i : i + 1], size, key)[0]) for i in range(len(indices))] == images.tolist()
    assert len(set(images.tolist())) == len(indices)
    assert (images >= 0).all()
    assert (images < size).all()


@pytest.mark.parametrize("half_bits", [1, 2, 5])
def test_a_pass_permutes_its_whole_domain(half_bits: int) -> None:
    values = np.arange(4**half_bits, dtype=np.uint64)
    assert np.array_equal(np.sort(feistel(values, half_bits, np.arange(8, dtype=np.uint64))), values)


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal counts."""
    expected = counts.mean()
    return float(((counts - expected) ** 2 / expected).sum())


def test_places_are_uniform() -> None:
    """Over 500 keys each of 40 indices goes to each place equally often, and two neighbors to each pair of places.

    The limits are four standard deviations above the mean of a chi-square, whose degrees of freedom are those of a
    square with fixed sums, and of the 90 ordered pairs.
    """
    size = 10
    images = np.array([order(size, f"0 {epoch}") for epoch in range(500)])
    places = np.stack([np.bincount(images[:, index], minlength=size) for index in range(size)])
    freedom = (size - 1) ** 2
    assert chi_square(places) * (size - 1) / size < freedom + 4 * (2 * freedom) ** 0.5
    pairs = np.bincount((images[:, :-1] * size + images[:, 1:]).ravel(), minlength=size**2).reshape(size, size)
    apart = pairs[~np.eye(size, dtype=bool)]
    assert chi_square(apart) < len(apart) + 4 * (2 * len(apart)) ** 0.5


def test_a_permutation_looks_shuffled() -> None:
    """Neither an index and its image nor neighboring images are correlated."""
    images = permute(np.arange(10_000), 10_000, "0 0")
    assert abs(np.corrcoef(np.arange(10_000), images)[0, 1]) < 0.04
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.04
    assert (images == np.arange(10_000)).sum() < 10
