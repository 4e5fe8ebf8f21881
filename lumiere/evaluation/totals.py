"""From the sums of documents to figures: the same formulas for a document, for all of them, and for a resample."""

import math
from typing import NamedTuple

import numpy as np

from lumiere.data.dataset import Sizes, TokenizedSplit


class DocumentTotals(NamedTuple):
    """Sums over the tokens of each document: arrays (D,).

    Attributes:
        nats: losses.
        num_scored: tokens that were scored; those that were scored twice count twice.
        at_1, at_5: as in `Scores`.
        num_targets: tokens that there are to predict, each once: all but the first.
        num_bytes, num_words, num_normalized_bytes: as in `Sizes`.
    """

    nats: np.ndarray
    num_scored: np.ndarray
    at_1: np.ndarray
    at_5: np.ndarray
    num_targets: np.ndarray
    num_bytes: np.ndarray
    num_words: np.ndarray
    num_normalized_bytes: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.nats)

    @property
    def total(self) -> "DocumentTotals":
        """All documents as one: numbers without an axis."""
        return DocumentTotals(*(column.sum() for column in self))


class Figures(NamedTuple):
    """Of each document, or of each resample; see `DetailedEvaluation` for what they are."""

    loss: np.ndarray
    perplexity: np.ndarray
    bits_per_byte: np.ndarray
    byte_perplexity: np.ndarray
    word_perplexity: np.ndarray
    accuracy: np.ndarray
    accuracy_at_5: np.ndarray


class GroupSums:
    """Sums of columns over the tokens of each group, added up part by part.

    Attributes:
        counts: (num_groups,) tokens.
        sums: (num_columns, num_groups).
    """

    def __init__(self, num_groups: int, num_columns: int) -> None:
        self.counts = np.zeros(num_groups, np.int64)
        self.sums = np.zeros((num_columns, num_groups))

    def add(self, groups: np.ndarray, *columns: np.ndarray) -> None:
        """Add some tokens: (S,) their groups, and a value of each in every column."""
        if not len(groups):
            return
        # Only as wide as the groups that are met: there may be a million documents.
        first = groups.min()
        met = np.s_[first : groups.max() + 1]
        self.counts[met] += np.bincount(groups - first)
        for sums, values in zip(self.sums, columns, strict=True):
            sums[met] += np.bincount(groups - first, values)

    @property
    def means(self) -> np.ndarray:
        """(num_columns, num_groups), NaN where a group has no token."""
        with np.errstate(invalid="ignore"):
            return self.sums / self.counts


def document_totals(
    split: TokenizedSplit, sizes: Sizes, counts: np.ndarray, nats: np.ndarray, at_1: np.ndarray, at_5: np.ndarray
) -> DocumentTotals:
    """The sums of a split's documents: (D,) each.

    Args:
        sizes: of each document, from `document_sizes`.
        counts, nats, at_1, at_5: scored tokens, and the sums of their columns in `Scores`.
    """
    return DocumentTotals(
        nats=nats,
        num_scored=counts,
        at_1=at_1,
        at_5=at_5,
        num_targets=np.diff(split.offsets) - 1,
        num_bytes=sizes.num_bytes,
        num_words=sizes.num_words,
        num_normalized_bytes=sizes.num_normalized_bytes,
    )


def figures(totals: DocumentTotals) -> Figures:
    """What the sums come to. A document without words or without anything to predict gives NaN."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        loss = totals.nats / totals.num_scored
        # The mean loss is taken for every token of the text once, also for those that two windows share.
        nats = loss * totals.num_targets
        bits_per_byte = nats / math.log(2) / totals.num_normalized_bytes
        return Figures(
            loss=loss,
            perplexity=np.exp(loss),
            bits_per_byte=bits_per_byte,
            byte_perplexity=np.exp2(bits_per_byte),
            word_perplexity=np.exp(nats / totals.num_words),
            accuracy=totals.at_1 / totals.num_scored,
            accuracy_at_5=totals.at_5 / totals.num_scored,
        )
