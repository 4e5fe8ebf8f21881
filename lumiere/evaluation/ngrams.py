"""N-gram baselines: what a transformer has to beat before it has learned anything beyond counting.

Each is fitted to a training split, and assigns every token a nonzero probability in every context; these sum to 1. Its
context is the preceding tokens of a row, as a transformer sees its window.

Shapes: N rows, T tokens per row, G observed n-grams, Vocab vocab_size.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np

ORDER = 5
"""Order of Kneser-Ney: the token and the four before it."""


class Baseline(Protocol):
    """A fitted baseline."""

    def losses(self, tokens_NT: np.ndarray) -> np.ndarray:
        """Return the loss of each token but the first of a row, in nats: (N, T-1)."""
        ...


def target_counts(ids: np.ndarray, offsets: np.ndarray, vocab_size: int) -> np.ndarray:
    """Count how often each token is a target, (Vocab,): in all positions but the first of a document.

    Args:
        ids: (num_tokens,), all documents concatenated.
        offsets: (num_documents + 1,), where each document starts in `ids`, and where the last one ends.
        vocab_size: Size of the vocabulary; ids are less than this.
    """
    firsts = ids[offsets[:-1]]
    return np.bincount(ids, minlength=vocab_size) - np.bincount(firsts, minlength=vocab_size)


@dataclass(frozen=True)
class UniformModel:
    """Uniform distribution, whose perplexity is `vocab_size`."""

    vocab_size: int

    def losses(self, tokens_NT: np.ndarray) -> np.ndarray:
        return np.full((len(tokens_NT), tokens_NT.shape[1] - 1), np.log(self.vocab_size))


@dataclass(frozen=True)
class UnigramModel:
    """Token frequencies with add-one (Laplace) smoothing: (c(w) + 1) / (sum of c + Vocab)."""

    log_probabilities: np.ndarray
    """(Vocab,), in nats."""

    @classmethod
    def fit(cls, ids: np.ndarray, offsets: np.ndarray, vocab_size: int) -> Self:
        """Count the tokens of a split. Arguments as in `target_counts`."""
        counts = target_counts(ids, offsets, vocab_size)
        return cls(np.log(counts + 1) - np.log(counts.sum() + vocab_size))

    def losses(self, tokens_NT: np.ndarray) -> np.ndarray:
        return -self.log_probabilities[tokens_NT[:, 1:]]


@dataclass(frozen=True)
class BigramModel:
    """Bigrams interpolated with `UnigramModel` (Witten and Bell 1991).

    P(w | h) = (c(h, w) + t(h) P(w)) / (c(h) + t(h)), where c(h, w) counts the pair, c(h) is its sum over w, and t(h) is
    the number of different tokens after h. If nothing ever followed h, it is P(w).
    """

    unigram: UnigramModel
    keys: np.ndarray
    """(G,), the observed pairs `h * Vocab + w`, sorted."""
    counts: np.ndarray
    """(G,), their counts."""
    context_counts: np.ndarray
    """(Vocab,) c(h)."""
    context_types: np.ndarray
    """(Vocab,) t(h)."""

    @classmethod
    def fit(cls, ids: np.ndarray, offsets: np.ndarray, vocab_size: int) -> Self:
        """Count the pairs of a split; none crosses a document. Arguments as in `target_counts`."""
        is_target = np.ones(len(ids), dtype=bool)
        is_target[offsets[:-1]] = False
        targets = np.flatnonzero(is_target)
        keys, counts = np.unique(ids[targets - 1].astype(np.int64) * vocab_size + ids[targets], return_counts=True)
        contexts = keys // vocab_size
        return cls(
            UnigramModel.fit(ids, offsets, vocab_size),
            keys,
            counts,
            np.bincount(contexts, weights=counts, minlength=vocab_size),
            np.bincount(contexts, minlength=vocab_size),
        )

    def losses(self, tokens_NT: np.ndarray) -> np.ndarray:
        before, targets = tokens_NT[:, :-1].astype(np.int64), tokens_NT[:, 1:]
        found = find(self.keys, before * len(self.context_counts) + targets)
        counts = np.where(found >= 0, self.counts[found], 0)
        lower = np.exp(self.unigram.log_probabilities[targets])
        types, totals = self.context_types[before], self.context_counts[before]
        is_known = types > 0
        seen = (counts + types * lower) / np.where(is_known, totals + types, 1)
        return -np.log(np.where(is_known, seen, lower))


class Level(NamedTuple):
    """The n-grams of one order. The index of an n-gram in `keys` is its number as a context one order up."""

    keys: np.ndarray
    """(G,), number of the first n-1 tokens, times Vocab, plus the last token; sorted."""
    discounted: np.ndarray
    """(G,), counts minus their discounts."""
    totals: np.ndarray
    """(contexts,), sum of the counts of all that followed; 1 if nothing did."""
    backoff: np.ndarray
    """(contexts,), probability removed by the discounts, which goes to the order below."""


@dataclass(frozen=True)
class KneserNey:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques").

    P_n(w | h) = (a(h w) - D(a(h w))) / a(h) + backoff(h) P_{n-1}(w | h without its first token), down to 1 / Vocab
    below the unigrams. In the highest order a is the count. In lower orders it is the number of different tokens before
    the n-gram; at the start of a document, where nothing precedes it, its occurrences are counted instead, as in KenLM
    after `<s>` (Heafield et al. 2013). D is computed by `discounts`. An order is skipped if the context is shorter or
    was not observed.
    """

    vocab_size: int
    levels: tuple[Level, ...]
    """From unigrams up, as far as observed."""

    @classmethod
    def fit(cls, ids: np.ndarray, offsets: np.ndarray, vocab_size: int, order: int = ORDER) -> Self:
        """Count the n-grams of a split; none crosses a document. Arguments as in `target_counts`.

        Raises:
            ValueError: `order` is below 2.
        """
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        places = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
        # Number of the n-gram that ends at each token. That of a unigram is its id, observed or not.
        numbers = np.asarray(ids, dtype=np.int64)
        keys, num_contexts = np.arange(vocab_size), 1
        levels = []
        for length in range(1, order):
            ends = np.flatnonzero(places >= length)
            longer_keys, firsts, inverse = np.unique(
                numbers[ends - 1] * vocab_size + ids[ends], return_index=True, return_inverse=True
            )
            # Each longer n-gram is one context of its suffix.
            counts = np.bincount(numbers[ends[firsts]], minlength=len(keys))
            if length > 1:
                counts += np.bincount(numbers[places == length - 1], minlength=len(keys))
            levels.append(make_level(keys, counts, vocab_size, num_contexts))
            num_contexts, keys = len(keys), longer_keys
            numbers = np.full(len(ids), -1)
            numbers[ends] = inverse
        counts = np.bincount(numbers[numbers >= 0], minlength=len(keys))
        levels.append(make_level(keys, counts, vocab_size, num_contexts))
        return cls(vocab_size, tuple(level for level in levels if len(level.keys)))

    def losses(self, tokens_NT: np.ndarray) -> np.ndarray:
        tokens_NT = tokens_NT.astype(np.int64)
        probabilities = np.full((len(tokens_NT), tokens_NT.shape[1] - 1), 1 / self.vocab_size)
        # Number of the n-gram before each token, -1 if not observed.
        contexts = np.zeros_like(probabilities, dtype=np.int64)
        for length, (keys, discounted, totals, backoff) in enumerate(self.levels, start=1):
            skipped = max(0, length - 2)
            if skipped >= tokens_NT.shape[1] - 1:
                break
            targets = tokens_NT[:, 1 + skipped :]
            found = np.where(contexts >= 0, find(keys, contexts * self.vocab_size + targets), -1)
            lower = probabilities[:, skipped:]
            own = np.where(found >= 0, discounted[found], 0) / totals[contexts]
            lower[:] = np.where(contexts >= 0, own + backoff[contexts] * lower, lower)
            # The n-gram that ends at a token is the context of the next one.
            contexts = tokens_NT[:, :-1] if length == 1 else found[:, :-1]
        return -np.log(probabilities)


def make_level(keys: np.ndarray, counts: np.ndarray, vocab_size: int, num_contexts: int) -> Level:
    """Return the level of one order from its n-grams and their counts."""
    contexts = keys // vocab_size
    taken = np.array([0.0, *discounts(counts)])[np.minimum(counts, 3)]
    totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
    safe_totals = np.maximum(totals, 1)
    backoff = np.bincount(contexts, weights=taken, minlength=num_contexts) / safe_totals
    return Level(keys, counts - taken, safe_totals, np.where(totals > 0, backoff, 1))


def discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """Return the discounts of the counts 1, 2, and 3 or more (Chen and Goodman 1998, equation 26).

    With n_k the number of n-grams of count k, and Y = n_1 / (n_1 + 2 n_2): k - (k + 1) Y n_{k+1} / n_k. Falls back to
    0.5, 1 and 1.5, as KenLM does, if the corpus is too small for that.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    if (n[1:5] == 0).any():
        return 0.5, 1.0, 1.5
    y = n[1] / (n[1] + 2 * n[2])
    found = tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
    return found if all(0 <= d <= k for k, d in enumerate(found, start=1)) else (0.5, 1.0, 1.5)


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the index of each wanted key in the sorted `keys`, or -1."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, places, -1)


def fit_baselines(ids: np.ndarray, offsets: np.ndarray, vocab_size: int) -> dict[str, Baseline]:
    """Fit all baselines, by name, weakest first. Arguments as in `target_counts`."""
    bigram = BigramModel.fit(ids, offsets, vocab_size)
    return {
        "uniform": UniformModel(vocab_size),
        "unigram": bigram.unigram,
        "bigram": bigram,
        f"kneser-ney {ORDER}-gram": KneserNey.fit(ids, offsets, vocab_size),
    }
