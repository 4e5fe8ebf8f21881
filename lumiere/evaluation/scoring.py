"""One pass of a model over a text that keeps, for each token that is scored, all that an evaluation is made of.

Slower than `lumiere.evaluation.evaluate`, which a training calls; what it gives does not depend on how many windows a
caller puts into a batch, since the windows go through the model in groups of their own.

Shapes: S scored tokens, M rows of a chunk, N rows, T tokens of a row, E embedding_size, Vocab vocab_size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
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
from lumiere.evaluation.ngrams import Baseline
from lumiere.models.transformer import Transformer

TOKENS_AT_ONCE = 2048
"""Tokens that go through the model together. Fixed, because another number gives other rounding errors."""
LOGITS_AT_ONCE = 2**21
"""8 MB in float32, which stay in the cache."""


@dataclass(frozen=True)
class Protocol:
    """Which windows are scored, and which of their tokens.

    Attributes:
        stride: tokens from the start of a window to the start of the next in a document.
        once: a token that two windows share is scored in the first of them only; otherwise in each.
    """

    stride: int
    once: bool

    @property
    def name(self) -> str:
        return f"stride-{self.stride}" if self.once else "windows"


def training_windows(split: TokenizedSplit, context_size: int, overlap: int) -> tuple[Windows, Protocol]:
    """The windows of training, tokens in the overlap of two scored in both: as `evaluate`, and the Lumiére card."""
    windows = split.windows(context_size, overlap)
    return windows, Protocol(windows.stride, once=False)


def strided_windows(split: TokenizedSplit, context_size: int, stride: int) -> tuple[Windows, Protocol]:
    """Windows that begin `stride` tokens apart, each token scored once.

    Every token sees at least `context_size - stride + 1` tokens before it, or all of its document; with a stride of 1
    that is the longest context that the model can have.

    Raises:
        LumiereError: `stride` is not between 1 and `context_size`.
    """
    if not 1 <= stride <= context_size:
        raise LumiereError(
            f"a stride of {stride:,} does not fit windows of {context_size:,} tokens",
            f"give 1 to {context_size:,}; the smaller, the longer the contexts and the time",
        )
    return split.windows(context_size, context_size + 1 - stride), Protocol(stride, once=True)


@dataclass(frozen=True)
class Scores(ShortRepr):
    """What is kept of each scored token, in the order of the windows: arrays (S,).

    Attributes:
        losses: in nats, float64.
        at_1, at_5: the probability that the token is among the 1 or 5 likeliest. It is 0 or 1 but where several tokens
            are exactly as likely as it: these share the places that they have together.
        confidences: the probability of the likeliest token.
        positions: how many tokens of the window came before.
        tokens: the id.
        documents: the document.
        windows: the window.
        baselines: the losses of models that count, on the same tokens with the same contexts.
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
    """The part of `Scores` that comes from logits: (S,), float64 on the CPU."""

    losses: Tensor
    at_1: Tensor
    at_5: Tensor
    confidences: Tensor


def score(
    model: Transformer, windows: Windows, once: bool, baselines: Mapping[str, Baseline], take: Callable[[Scores], None]
) -> None:
    """Score the windows without dropout, in the precision of the model's weights.

    Args:
        model: on any device; it is left in the mode in which it came.
        once: as `Protocol.once`.
        baselines: fitted models, by name.
        take: called with the scores of each group of windows, in order. A long text has too many to keep.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for scores in score_parts(model, windows, once, baselines):
                take(scores)
    finally:
        model.train(was_training)


def score_parts(
    model: Transformer, windows: Windows, once: bool, baselines: Mapping[str, Baseline]
) -> Iterator[Scores]:
    """Yield the scores of each group of windows."""
    device = next(model.parameters()).device
    size = max(1, TOKENS_AT_ONCE // windows.context_size)
    for first in range(0, len(windows), size):
        indices = np.arange(first, min(first + size, len(windows)))
        batch = make_batch(windows, indices)
        documents = windows.documents(indices)
        is_scored = (batch.targets != IGNORED).numpy()
        if once:
            continues = documents == windows.documents(indices - 1)
            continues[indices == 0] = False
            # All but the last `stride` targets stand in the window before too.
            is_scored[continues, : windows.context_size - windows.stride] = False
        rows, columns = np.nonzero(is_scored)
        residual_SE = model.final_residual(batch.tokens.to(device))[torch.from_numpy(is_scored).to(device)]
        tokens_S = batch.targets[rows, columns]
        found = score_logits(residual_SE, model.token_embedding.weight, tokens_S.to(device))
        windows_NT, _ = windows.cut(indices)
        own = {
            **{name: values.cpu().double().numpy() for name, values in found._asdict().items()},
            "positions": columns + 1,
            "tokens": tokens_S.numpy(),
            "documents": documents[rows],
            "windows": indices[rows],
        }
        theirs = {name: baseline.losses(windows_NT)[rows, columns] for name, baseline in baselines.items()}
        yield Scores(**own, baselines=theirs)


def score_logits(residual_SE: Tensor, weight_VocabE: Tensor, tokens_S: Tensor) -> ModelScores:
    """The scores of tokens by the logits `residual @ weight.T`, of which only a chunk exists at a time."""
    size = max(1, LOGITS_AT_ONCE // len(weight_VocabE))
    wide = torch.float64 if residual_SE.device.type == "cpu" else torch.float32  # not every device has float64
    parts = []
    for residual_ME, tokens_M in zip(residual_SE.split(size), tokens_S.split(size), strict=True):
        logits = residual_ME @ weight_VocabE.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits -= logits.amax(1, keepdim=True)
        own_M1 = logits.gather(1, tokens_M.unsqueeze(1))
        # Counted in float32, which is exact up to 2**24 and several times as fast as adding up booleans.
        marks = torch.empty_like(logits)
        num_above = torch.gt(logits, own_M1, out=marks).sum(1)
        num_equal = torch.eq(logits, own_M1, out=marks).sum(1)
        sums_M = logits.exp_().sum(1, dtype=wide)
        at_1_M, at_5_M = (share_of_top(num_above.to(wide), num_equal, k) for k in (1, 5))
        parts.append(ModelScores(sums_M.log() - own_M1.squeeze(1), at_1_M, at_5_M, 1 / sums_M))
    return ModelScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


Counts = TypeVar("Counts", Tensor, np.ndarray)


def share_of_top(num_above: Counts, num_equal: Counts, k: int) -> Counts:
    """The probability that a token is among the k most probable, if tied tokens share their places.

    Args:
        num_above: how many tokens are more probable.
        num_equal: how many are exactly as probable, the token itself included.
    """
    return ((k - num_above) / num_equal).clip(0, 1)


def shared_place(num_above: Counts, num_equal: Counts) -> Counts:
    """The mean of the places that tied tokens have together, counted from 0."""
    return num_above + (num_equal - 1) / 2


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


FEW_DOCUMENTS = 20
"""Below this, intervals use Student's t, and the output says that the documents are few."""
NORMAL_975 = 1.960
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262),
    *(2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101),
)
"""The 97.5 % quantiles of Student's t distribution with 1 to 18 degrees of freedom."""


def half_width(num_documents: int) -> float:
    """Return how many standard errors a 95 % interval extends to each side.

    Args:
        num_documents: at least 2.
    """
    return T_975[num_documents - 2] if num_documents < FEW_DOCUMENTS else NORMAL_975


def clustered_means(
    sums_US: np.ndarray, counts_S: np.ndarray, documents_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return means over tokens and their standard errors, clustered by document.

    The standard error is that of a ratio of sums over D documents (Cochran 1977, "Sampling Techniques", equation 2.46):
    `sqrt(D / (D - 1) sum (sum_d - mean count_d)^2) / sum count_d`.

    Args:
        sums_US: the sum of each quantity over the tokens of each sequence.
        counts_S: the number of these tokens.
        documents_S: which document each sequence is cut from.

    Returns:
        means, standard errors: (U,) both; the errors are NaN for a single document.
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
