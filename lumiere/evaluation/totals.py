"""From the sums of documents to figures: the same formulas for a document, for all of them, and for a resample."""

import math
from typing import NamedTuple

import numpy as np

from lumiere.data.dataset import Sizes, TokenizedSplit
from lumiere.evaluation.scoring import Scores


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


def document_totals(scores: Scores, losses: np.ndarray, split: TokenizedSplit, sizes: Sizes) -> DocumentTotals:
    """The sums of a split's documents.

    Args:
        losses: (S,) those of the model, or of a baseline.
        sizes: of each document, from `document_sizes`.
    """

    def total(values: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(scores.documents, values, minlength=split.facts.num_documents)

    return DocumentTotals(
        nats=total(losses),
        num_scored=total(),
        at_1=total(scores.at_1),
        at_5=total(scores.at_5),
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
