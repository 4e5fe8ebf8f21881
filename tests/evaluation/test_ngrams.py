"""Counting models against numbers worked out by hand, against dictionaries, and against the laws of probability."""

import math
from collections import Counter, defaultdict
from itertools import chain
from typing import Any

import numpy as np
import pytest

from lumiere.evaluation.ngrams import BigramModel, KneserNey, UniformModel, UnigramModel, discounts

VOCAB = 7
DOCUMENTS = [[0, 3, 4, 3, 5, 1], [0, 4, 3, 4, 1], [0, 1], [0]]
"""Targets: 3 x3, 4 x3, 5 x1, 1 x3; the last document has none."""


def flat(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(chain(*documents)), dtype=np.uint16), np.cumsum([0, *map(len, documents)])


def drawn(seed: int, vocab_size: int, lengths: list[int]) -> list[list[int]]:
    """Documents in which some tokens are common and most are rare, so that every discount is used."""
    draw = np.random.default_rng(seed)
    return [[0, *np.minimum(draw.geometric(0.3, length), vocab_size - 1).tolist()] for length in lengths]


LARGE = drawn(1, 9, [40, 25, 1, 33, 60, 2])
FITS: dict[str, Any] = {
    "unigram": UnigramModel.fit,
    "bigram": BigramModel.fit,
    "kneser-ney 2": lambda *split: KneserNey.fit(*split, order=2),
    "kneser-ney 5": KneserNey.fit,
}


@pytest.mark.parametrize("documents", [DOCUMENTS, LARGE, [[0, 3]]], ids=["small", "large", "one pair"])
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_probabilities_sum_to_one_in_every_context(fit: Any, documents: list[list[int]]) -> None:
    vocab_size = 9
    model = fit(*flat(documents), vocab_size)
    draw = np.random.default_rng(2)
    contexts = [document[:end] for document in documents for end in range(1, len(document))][:60]
    contexts += draw.integers(0, vocab_size, (40, 6)).tolist()  # most of which were never seen
    for context in contexts:
        rows = np.array([[*context, token] for token in range(vocab_size)])
        probabilities = np.exp(-model.losses(rows)[:, -1])
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_unigrams_and_bigrams_by_hand() -> None:
    unigram, bigram = UnigramModel.fit(*flat(DOCUMENTS), VOCAB), BigramModel.fit(*flat(DOCUMENTS), VOCAB)
    rows = np.array([[0, 3, 4, 5, 6, 4], [5, 0, 1, 1, 3, 3]])
    # 10 targets, 7 tokens: 4/17 for those seen three times, 2/17 for one, 1/17 for none.
    first, second = [4, 4, 2, 1, 4], [1, 4, 4, 4, 4]
    assert np.exp(-unigram.losses(rows)) == pytest.approx(np.array([first, second]) / 17)
    # 0 is followed by 3, 4, 1; 3 by 4, 5, 4; 4 by 3, 3, 1; 5 by 1; 1 and 6 by nothing.
    expected = [
        [(1 + 3 * 4 / 17) / 6, (2 + 2 * 4 / 17) / 5, (0 + 2 * 2 / 17) / 5, (0 + 1 * 1 / 17) / 2, 4 / 17],
        [(0 + 1 * 1 / 17) / 2, (1 + 3 * 4 / 17) / 6, 4 / 17, 4 / 17, (0 + 2 * 4 / 17) / 5],
    ]
    assert np.exp(-bigram.losses(rows)) == pytest.approx(np.array(expected))


def test_uniform_is_the_vocabulary() -> None:
    assert np.exp(UniformModel(VOCAB).losses(np.zeros((2, 4), dtype=int))) == pytest.approx(np.full((2, 3), VOCAB))


def test_kneser_ney_by_hand() -> None:
    """Two tokens a, b after a start: counts small enough for the discounts to be 0.5, 1 and 1.5."""
    start, a, b = 0, 1, 2
    model = KneserNey.fit(*flat([[start, a, b], [start, a, a, b]]), 3, order=2)
    # Pairs: (start, a) x2, (a, b) x2, (a, a) x1. Before a stood start and a; before b stood a.
    # Unigrams: a has 2 contexts, b 1, of 3: a is (2 - 1)/3, b (1 - 0.5)/3, and 1.5/3 is spread over 3 tokens.
    unigram = {start: 0.5 / 3, a: 1 / 3 + 0.5 / 3, b: 0.5 / 3 + 0.5 / 3}
    # After start: a (2 - 1)/2, backing off 1/2. After a: b (2 - 1)/3, a (1 - 0.5)/3, backing off 1.5/3.
    expected = {
        (start, a): 0.5 + 0.5 * unigram[a],
        (start, b): 0.5 * unigram[b],
        (a, a): 0.5 / 3 + 0.5 * unigram[a],
        (a, b): 1 / 3 + 0.5 * unigram[b],
        (a, start): 0.5 * unigram[start],
        (b, a): unigram[a],
    }
    for (before, token), probability in expected.items():
        assert np.exp(-model.losses(np.array([[before, token]]))) == pytest.approx(np.array([[probability]]))


def test_discounts_by_hand() -> None:
    counts = np.repeat([1, 2, 3, 4, 7], [40, 12, 6, 3, 9])
    y = 40 / (40 + 24)
    assert discounts(counts) == pytest.approx((1 - 2 * y * 12 / 40, 2 - 3 * y * 6 / 12, 3 - 4 * y * 3 / 6))
    assert discounts(np.array([1, 1, 2, 3])) == (0.5, 1.0, 1.5), "no n-gram has the count 4"
    assert discounts(np.repeat([1, 2, 3, 4], [1, 2, 9, 1])) == (0.5, 1.0, 1.5), "a discount would be below 0"


class Dictionaries:
    """Kneser-Ney once more, recursive and with dictionaries of tuples."""

    def __init__(self, documents: list[list[int]], vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        self.counts: list[Counter[tuple[int, ...]]] = []
        for n in range(1, order + 1):
            raw = Counter(tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1))
            if n < order:
                longer = {tuple(d[i : i + n + 1]) for d in documents for i in range(len(d) - n)}
                adjusted = Counter(gram[1:] for gram in longer)
                if n > 1:
                    adjusted += Counter(tuple(d[:n]) for d in documents if len(d) >= n)
                raw = adjusted
            self.counts.append(raw)
        self.followers: list[dict[tuple[int, ...], list[int]]] = []
        for counts in self.counts:
            followers = defaultdict(list)
            for gram, count in counts.items():
                followers[gram[:-1]].append(count)
            self.followers.append(followers)

    def discount(self, n: int, count: int) -> float:
        of = Counter(self.counts[n - 1].values())
        if not all(of[k] for k in (1, 2, 3, 4)):
            found = [0.5, 1.0, 1.5]
        else:
            y = of[1] / (of[1] + 2 * of[2])
            found = [k - (k + 1) * y * of[k + 1] / of[k] for k in (1, 2, 3)]
            if not all(0 <= d <= k for k, d in zip((1, 2, 3), found, strict=True)):
                found = [0.5, 1.0, 1.5]
        return found[min(count, 3) - 1] if count else 0.0

    def probability(self, context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = self.probability(context[1:], token) if context else 1 / self.vocab_size
        followers = self.followers[n - 1].get(context)
        if not followers:
            return lower
        count = self.counts[n - 1][(*context, token)]
        backoff = sum(self.discount(n, other) for other in followers)
        return (count - self.discount(n, count) + backoff * lower) / sum(followers)

    def losses(self, row: list[int]) -> list[float]:
        ends = range(1, len(row))
        return [-math.log(self.probability(tuple(row[max(0, i - self.order + 1) : i]), row[i])) for i in ends]


@pytest.mark.parametrize("order", [2, 3, 5])
def test_kneser_ney_equals_dictionaries(order: int) -> None:
    vocab_size = 9
    model, other = KneserNey.fit(*flat(LARGE), vocab_size, order), Dictionaries(LARGE, vocab_size, order)
    found = {discounts(np.array(list(counts.values()))) for counts in other.counts}
    assert found - {(0.5, 1.0, 1.5)}, "an order has discounts of its own"
    rows = [*drawn(3, vocab_size, [12] * 20), *(document[:13] for document in LARGE if len(document) > 12)]
    expected = [other.losses(row) for row in rows]
    assert model.losses(np.array(rows)) == pytest.approx(np.array(expected), rel=1e-12)


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_a_row_sees_only_what_precedes_in_it(fit: Any) -> None:
    model = fit(*flat(LARGE), 9)
    rows = np.array(drawn(4, 9, [8] * 5))
    whole = model.losses(rows)
    assert model.losses(rows[:, :4]) == pytest.approx(whole[:, :3], rel=1e-12)
    assert model.losses(rows[:, :1]).shape == (5, 0)


def test_an_order_below_two_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        KneserNey.fit(*flat(DOCUMENTS), VOCAB, order=1)
