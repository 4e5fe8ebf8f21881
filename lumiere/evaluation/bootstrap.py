"""How sure a figure is: the bootstrap over documents (Efron 1979; paired, as Koehn 2004 does for translation).

Documents, not tokens, are drawn again, because the losses of tokens in one document depend on each other.

Shapes: R resamples, D documents.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lumiere.evaluation.clusters import FEW_DOCUMENTS, half_width
from lumiere.evaluation.totals import DocumentTotals, Figures, figures

NUM_RESAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95
WEIGHTS_AT_ONCE = 2**21


@dataclass(frozen=True)
class PairedDifference:
    """A figure of one model less that of another, on the same documents.

    Attributes:
        standard_error: standard deviation of the difference over the resamples.
        low, high: the middle `confidence` of the resamples; with fewer than `FEW_DOCUMENTS` documents, whose
            resamples vary too little, the interval of Student's t around the difference.
        num_documents: documents in each resample.
        num_lower: documents on which the figure is lower.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    confidence: float
    num_documents: int
    num_lower: int
    num_resamples: int
    seed: int


def standard_errors(totals: DocumentTotals) -> Mapping[str, float] | None:
    """The standard deviation of each of the `Figures` over resamples of the documents; None where there is but one."""
    if totals.num_documents < 2:
        return None
    resamples = [figures(resampled) for resampled in resample(totals)]
    columns = {name: np.concatenate([getattr(part, name) for part in resamples]) for name in Figures._fields}
    # A perplexity may be infinite; then so is its error.
    with np.errstate(invalid="ignore"):
        return {name: float(np.std(values, ddof=1)) for name, values in columns.items()}


def paired_difference(base: DocumentTotals, other: DocumentTotals, figure: str) -> PairedDifference | None:
    """`figure` of `other` less that of `base`, both over the same resamples; None where there is but one document.

    Args:
        figure: a field of `Figures`.

    Raises:
        ValueError: the documents are not the same.
    """
    if not np.array_equal(base.num_bytes, other.num_bytes):
        raise ValueError("a paired difference needs the same documents")
    if base.num_documents < 2:
        return None

    def values(totals: DocumentTotals) -> np.ndarray:
        return np.concatenate([getattr(figures(resampled), figure) for resampled in resample(totals)])

    differences = values(other) - values(base)
    difference = float(getattr(figures(other.total), figure) - getattr(figures(base.total), figure))
    standard_error = float(np.std(differences, ddof=1))
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if (count := base.num_documents) < FEW_DOCUMENTS:
        # The variance over resamples of D documents is (D - 1) / D of the unbiased one.
        reach = half_width(count) * standard_error * np.sqrt(count / (count - 1))
        low, high = difference - reach, difference + reach
    each = getattr(figures(other), figure) - getattr(figures(base), figure)
    return PairedDifference(
        difference=difference,
        standard_error=standard_error,
        low=float(low),
        high=float(high),
        confidence=CONFIDENCE,
        num_documents=base.num_documents,
        num_lower=int((each < 0).sum()),
        num_resamples=NUM_RESAMPLES,
        seed=SEED,
    )


def resample(totals: DocumentTotals) -> Iterator[DocumentTotals]:
    """`NUM_RESAMPLES` draws of all documents with replacement, each summed up; a part of them at a time.

    The draws depend on the number of documents only, so that those of two models on the same documents are pairs.
    """
    draw = np.random.default_rng(SEED)
    count = totals.num_documents
    size = max(1, WEIGHTS_AT_ONCE // count)
    for first in range(0, NUM_RESAMPLES, size):
        rows = min(size, NUM_RESAMPLES - first)
        weights_RD = draw.multinomial(count, np.full(count, 1 / count), size=rows).astype(float)
        yield DocumentTotals(*(weights_RD @ column for column in totals))
