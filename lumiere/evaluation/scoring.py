"""Score every token of a text, sum the scores per document, and estimate standard errors of the resulting metrics.

Slower than `lumiere.evaluation.loss.evaluate`, which training calls. Results do not depend on a batch size.

Documents are the sampling unit of all standard errors: tokens and windows of one document resemble each other, so
treating them as independent would make errors too small.

Shapes: S scored tokens or sequences, M rows of a chunk, N rows, T tokens per row, E embedding_size, Vocab vocab_size,
D documents, R resamples, U quantities.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lumiere.components.kernels import IGNORED
from lumiere.components.short_repr import ShortRepr
from lumiere.data.batches import Windows, make_batch
from lumiere.data.dataset import Sizes, TokenizedSplit
from lumiere.errors import LumiereError
from lumiere.evaluation.loss import evaluation_mode
from lumiere.evaluation.ngrams import Baseline
from lumiere.models.transformer import Transformer

TOKENS_AT_ONCE = 2048
"""Tokens per forward pass. Fixed, because the number affects rounding."""
LOGITS_AT_ONCE = 2**21
"""8 MB in float32, which fit into the cache."""


@dataclass(frozen=True)
class Protocol:
    """Which windows are scored, and which of their tokens.

    Attributes:
        stride: Tokens between the starts of consecutive windows of a document.
        once: Whether a token in two windows is scored only in the first of them.
        only_last: Whether only the last token of each document's text is scored.
    """

    stride: int
    once: bool
    only_last: bool = False

    @property
    def name(self) -> str:
        return "last" if self.only_last else f"stride-{self.stride}" if self.once else "windows"


def training_windows(
    split: TokenizedSplit, context_size: int, overlap: int, only_last: bool = False
) -> tuple[Windows, Protocol]:
    """Return the training windows, scoring overlaps twice as `evaluate` and the original model card do.

    Args:
        only_last: As in `Windows`.
    """
    windows = split.windows(context_size, overlap, only_last=only_last)
    return windows, Protocol(windows.stride, only_last, only_last)


def strided_windows(split: TokenizedSplit, context_size: int, stride: int) -> tuple[Windows, Protocol]:
    """Return windows that start `stride` tokens apart, scoring each token once.

    Every token is predicted from at least `context_size - stride + 1` tokens, or all that precede it in the document. A
    stride of 1 gives every token the longest context that the model can have.

    Raises:
        LumiereError: `stride` is not between 1 and `context_size`.
    """
    if not 1 <= stride <= context_size:
        raise LumiereError(
            f"the stride must be 1 to {context_size:,} for windows of {context_size:,} tokens, got {stride:,}",
            "smaller strides give longer contexts and take longer",
        )
    return split.windows(context_size, context_size + 1 - stride), Protocol(stride, once=True)


@dataclass(frozen=True)
class Scores(ShortRepr):
    """Scores of each token in the order of the windows: arrays (S,).

    Attributes:
        losses: In nats, float64.
        at_1, at_5: Whether the token is among the top 1 or 5: 0 or 1, or a fraction for tokens of equal probability,
            which share their places.
        confidences: Probability of the top-1 token.
        positions: Number of preceding tokens in the window.
        tokens, documents, windows: Id of the token, and numbers of its document and window.
        baselines: Losses of the n-gram baselines on the same tokens with the same contexts.
    """

    losses: np.ndarray
    at_1: np.ndarray
    at_5: np.ndarray
    confidences: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray
    windows: np.ndarray
    baselines: Mapping[str, np.ndarray]


class ModelScores(NamedTuple):
    """The scores that are computed from logits: (S,), float64 on the CPU."""

    losses: Tensor
    at_1: Tensor
    at_5: Tensor
    confidences: Tensor


def score(
    model: Transformer, windows: Windows, once: bool, baselines: Mapping[str, Baseline], take: Callable[[Scores], None]
) -> None:
    """Score the windows without dropout, in the precision of the model's weights.

    Args:
        model: On any device. Its training mode is restored.
        once: See `Protocol.once`.
        baselines: Fitted baselines by name.
        take: Called with the scores of each group of windows, in order. Long texts have too many to keep.
    """
    device = next(model.parameters()).device
    size = max(1, TOKENS_AT_ONCE // windows.context_size)
    with evaluation_mode(model):
        for first in range(0, len(windows), size):
            indices = np.arange(first, min(first + size, len(windows)))
            batch = make_batch(windows, indices)
            documents = windows.documents(indices)
            is_scored = (batch.targets != IGNORED).numpy()
            if once:
                continues = documents == windows.documents(indices - 1)
                continues[indices == 0] = False
                # All but the last `stride` targets are also in the window before.
                is_scored[continues, : windows.context_size - windows.stride] = False
            rows, columns = np.nonzero(is_scored)
            residual_SE = model.final_residual(batch.tokens.to(device))[torch.from_numpy(is_scored).to(device)]
            tokens_S = batch.targets[rows, columns]
            found = score_logits(residual_SE, model.unembedding, tokens_S.to(device), model.num_tokens)
            windows_NT, _ = windows.cut(indices)
            own = {
                **{name: values.cpu().double().numpy() for name, values in found._asdict().items()},
                "positions": columns + 1,
                "tokens": tokens_S.numpy(),
                "documents": documents[rows],
                "windows": indices[rows],
            }
            theirs = {name: baseline.losses(windows_NT)[rows, columns] for name, baseline in baselines.items()}
            take(Scores(**own, baselines=theirs))


def score_logits(
    residual_SE: Tensor, weight_VocabE: Tensor, tokens_S: Tensor, num_tokens: int | None = None
) -> ModelScores:
    """Score tokens by the logits `residual @ weight.T`, computed in chunks.

    Args:
        num_tokens: Rows of the weight that are tokens, which compete for the top. Default: all.
    """
    size = max(1, LOGITS_AT_ONCE // len(weight_VocabE))
    wide = torch.float64 if residual_SE.device.type == "cpu" else torch.float32  # not every device has float64
    parts = []
    for residual_ME, tokens_M in zip(residual_SE.split(size), tokens_S.split(size), strict=True):
        logits = residual_ME @ weight_VocabE.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits -= logits.amax(1, keepdim=True)
        own_M1 = logits.gather(1, tokens_M.unsqueeze(1))
        # Count in float32, which is exact up to 2**24 and several times faster than summing booleans.
        marks = torch.empty_like(logits)
        num_above = torch.gt(logits, own_M1, out=marks)[:, :num_tokens].sum(1)
        num_equal = torch.eq(logits, own_M1, out=marks)[:, :num_tokens].sum(1)
        sums_M = logits.exp_().sum(1, dtype=wide)
        at_1_M, at_5_M = (share_of_top(num_above.to(wide), num_equal, k) for k in (1, 5))
        parts.append(ModelScores(sums_M.log() - own_M1.squeeze(1), at_1_M, at_5_M, 1 / sums_M))
    return ModelScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


Counts = TypeVar("Counts", Tensor, np.ndarray)


def share_of_top(num_above: Counts, num_equal: Counts, k: int) -> Counts:
    """Return the probability that a token is in the top k, if tied tokens share their places.

    Args:
        num_above: Number of more probable tokens.
        num_equal: Number of equally probable tokens, including the token itself.
    """
    return ((k - num_above) / num_equal).clip(0, 1)


def shared_place(num_above: Counts, num_equal: Counts) -> Counts:
    """Return the mean rank of tied tokens, counted from 0."""
    return num_above + (num_equal - 1) / 2


class DocumentTotals(NamedTuple):
    """Sums over the tokens of each document: arrays (D,).

    Attributes:
        nats: Losses.
        num_scored: Scored tokens; those scored twice count twice.
        at_1, at_5: See `Scores`.
        num_targets: Tokens to predict, each counted once: all but the first, or only the last.
        num_bytes, num_words, num_normalized_bytes: See `Sizes`.
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
        """The sums over all documents: scalars."""
        return DocumentTotals(*(column.sum() for column in self))


class Metrics(NamedTuple):
    """Metrics of each document, or of each resample; see `Evaluation` and `DetailedEvaluation`."""

    loss: np.ndarray
    perplexity: np.ndarray
    bits_per_byte: np.ndarray
    byte_perplexity: np.ndarray
    word_perplexity: np.ndarray
    accuracy: np.ndarray
    accuracy_at_5: np.ndarray


class GroupSums:
    """Running sums of columns over the tokens of each group.

    Attributes:
        counts: (num_groups,), tokens.
        sums: (num_columns, num_groups).
    """

    def __init__(self, num_groups: int, num_columns: int) -> None:
        self.counts = np.zeros(num_groups, np.int64)
        self.sums = np.zeros((num_columns, num_groups))

    def add(self, groups: np.ndarray, *columns: np.ndarray) -> None:
        """Add tokens: their groups (S,), and their values (S,) in every column."""
        if not len(groups):
            return
        # Touch only the range of these groups: there may be a million documents.
        first = groups.min()
        met = np.s_[first : groups.max() + 1]
        self.counts[met] += np.bincount(groups - first)
        for sums, values in zip(self.sums, columns, strict=True):
            sums[met] += np.bincount(groups - first, values)

    @property
    def means(self) -> np.ndarray:
        """(num_columns, num_groups), NaN for empty groups."""
        with np.errstate(invalid="ignore"):
            return self.sums / self.counts


def document_totals(
    split: TokenizedSplit,
    sizes: Sizes,
    protocol: Protocol,
    counts: np.ndarray,
    nats: np.ndarray,
    at_1: np.ndarray,
    at_5: np.ndarray,
) -> DocumentTotals:
    """Return the sums of the documents of a split.

    Args:
        sizes: Sizes of the documents, from `document_sizes`.
        protocol: What was scored.
        counts, nats, at_1, at_5: Scored tokens, and the sums of their columns in `Scores`: (D,) each.
    """
    lengths = (sizes.num_bytes, sizes.num_words, sizes.num_normalized_bytes)
    num_targets = counts if protocol.only_last else np.diff(split.offsets) - 1
    return DocumentTotals(nats, counts, at_1, at_5, num_targets, *lengths)


def metrics(totals: DocumentTotals) -> Metrics:
    """Compute the metrics of sums: for documents, for all of them, or for resamples. Empty documents give NaN."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        loss = totals.nats / totals.num_scored
        # The mean loss, counted once for every token of the text, also for those in two windows.
        nats = loss * totals.num_targets
        bits_per_byte = nats / math.log(2) / totals.num_normalized_bytes
        return Metrics(
            loss=loss,
            perplexity=np.exp(loss),
            bits_per_byte=bits_per_byte,
            byte_perplexity=np.exp2(bits_per_byte),
            word_perplexity=np.exp(nats / totals.num_words),
            accuracy=totals.at_1 / totals.num_scored,
            accuracy_at_5=totals.at_5 / totals.num_scored,
        )


NUM_RESAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95
WEIGHTS_AT_ONCE = 2**21


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a metric between two models on the same documents.

    Attributes:
        standard_error: Standard deviation of the difference over the resamples.
        low, high: Central interval of the resamples with probability `confidence`; with fewer than `FEW_DOCUMENTS`
            documents, whose resamples vary too little, Student's t interval around the difference.
        num_lower: Number of documents on which the metric is lower.
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
    """Return the standard error of each metric by bootstrap over documents (Efron 1979); None for a single document."""
    if totals.num_documents < 2:
        return None
    # An infinite perplexity has an infinite error.
    with np.errstate(invalid="ignore"):
        return {name: float(np.std(values, ddof=1)) for name, values in resampled(totals)._asdict().items()}


def paired_difference(base: DocumentTotals, other: DocumentTotals, metric: str) -> PairedDifference | None:
    """Return a metric of `other` minus that of `base`, by paired bootstrap; None for a single document.

    Both use the same resamples of documents, as in Koehn 2004 for translation.

    Args:
        metric: A field of `Metrics`.

    Raises:
        ValueError: The documents differ.
    """
    if not np.array_equal(base.num_bytes, other.num_bytes):
        raise ValueError("a paired difference needs the same documents")
    if base.num_documents < 2:
        return None
    differences = getattr(resampled(other), metric) - getattr(resampled(base), metric)
    difference = float(getattr(metrics(other.total), metric) - getattr(metrics(base.total), metric))
    standard_error = float(np.std(differences, ddof=1))
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if (count := base.num_documents) < FEW_DOCUMENTS:
        # The variance over resamples of D documents is (D - 1) / D of the unbiased variance.
        reach = half_width(count) * standard_error * np.sqrt(count / (count - 1))
        low, high = difference - reach, difference + reach
    each = getattr(metrics(other), metric) - getattr(metrics(base), metric)
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


def resampled(totals: DocumentTotals) -> Metrics:
    """Return the metrics of `NUM_RESAMPLES` resamples of the documents with replacement, (NUM_RESAMPLES,) each.

    The draws depend only on the number of documents, so those of two models on the same documents are paired.
    """
    draw = np.random.default_rng(SEED)
    count = totals.num_documents
    size = max(1, WEIGHTS_AT_ONCE // count)
    parts = []
    for first in range(0, NUM_RESAMPLES, size):
        rows = min(size, NUM_RESAMPLES - first)
        weights_RD = draw.multinomial(count, np.full(count, 1 / count), size=rows).astype(float)
        parts.append(metrics(DocumentTotals(*(weights_RD @ column for column in totals))))
    return Metrics(*map(np.concatenate, zip(*parts, strict=True)))


FEW_DOCUMENTS = 20
"""With fewer documents, intervals use Student's t, and the output notes it."""
NORMAL_975 = 1.960
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262),
    *(2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101),
)
"""97.5 % quantiles of Student's t distribution with 1 to 18 degrees of freedom."""


def half_width(num_documents: int) -> float:
    """Return the half width of a 95 % interval in standard errors, for at least 2 documents."""
    return T_975[num_documents - 2] if num_documents < FEW_DOCUMENTS else NORMAL_975


def clustered_means(
    sums_US: np.ndarray, counts_S: np.ndarray, documents_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return means over tokens and their standard errors, clustered by document.

    The standard error is that of a ratio of sums over D documents (Cochran 1977, "Sampling Techniques", equation 2.46):
    `sqrt(D / (D - 1) sum (sum_d - mean count_d)^2) / sum count_d`.

    Args:
        sums_US: Sum of each quantity over the tokens of each sequence.
        counts_S: Number of these tokens.
        documents_S: Document of each sequence.

    Returns:
        Means and standard errors, (U,) both; the errors are NaN for a single document.
    """
    numbers, documents_S = np.unique(documents_S, return_inverse=True)
    order = np.argsort(documents_S, kind="stable")
    starts_D = np.searchsorted(documents_S[order], np.arange(len(numbers)))
    sums_UD = np.add.reduceat(sums_US[:, order], starts_D, axis=1)
    counts_D = np.add.reduceat(counts_S[order], starts_D)
    means_U = sums_UD.sum(1) / counts_D.sum()
    if len(numbers) < 2:
        return means_U, np.full_like(means_U, np.nan)
    squares_U = np.square(sums_UD - means_U[:, None] * counts_D).sum(1)
    return means_U, np.sqrt(len(numbers) / (len(numbers) - 1) * squares_U) / counts_D.sum()
