"""All that one pass tells of a model on a text: averages, accuracy, calibration, where the loss is, how sure it is."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lumiere.baselines.ngrams import Baseline, target_counts
from lumiere.components.short_repr import ShortRepr
from lumiere.data.dataset import Sizes, TokenizedSplit
from lumiere.data.windows import Windows
from lumiere.evaluation import Evaluation
from lumiere.evaluation.bootstrap import NUM_RESAMPLES, SEED, standard_errors
from lumiere.evaluation.scoring import Protocol, Scores, score
from lumiere.evaluation.totals import DocumentTotals, document_totals, figures
from lumiere.models.transformer import Transformer

NUM_BINS = 15
"""Of the reliability table, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Calibration(ShortRepr):
    """How far the probability of the likeliest token is how often it is right (Guo et al. 2017, arXiv:1706.04599).

    Attributes:
        ece: expected calibration error: the mean over tokens of the distance between confidence and accuracy of the
            token's bin (equation 3), with `NUM_BINS` bins of equal width.
        counts: tokens of each bin, from low to high confidence.
        confidences: mean confidence of each bin; NaN where it is empty.
        accuracies: share of each bin's tokens whose likeliest token was right; NaN where it is empty.
    """

    ece: float
    counts: list[int]
    confidences: list[float]
    accuracies: list[float]


@dataclass(frozen=True)
class LossByGroup(ShortRepr):
    """The mean loss of groups of tokens, in nats; NaN where a group has none.

    Attributes:
        names: a position, or a range of counts.
        losses: of each group.
        counts: scored tokens of each group.
    """

    names: list[str]
    losses: list[float]
    counts: list[int]


@dataclass(frozen=True)
class LossByDocument(ShortRepr):
    """Of each document, in the order of the split."""

    losses: list[float]
    bits_per_byte: list[float]
    num_tokens: list[int]
    num_bytes: list[int]


@dataclass(frozen=True)
class BaselineScore:
    """A model that counts, on the same tokens with the same contexts."""

    name: str
    loss: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class DetailedEvaluation(ShortRepr):
    """The losses of one pass over a text, and what else it shows.

    Attributes:
        evaluation: the averages, as `evaluate` gives them.
        byte_perplexity: 2 to the power of the bits per byte.
        normalized_share: share of the text's bytes that the tokenizer's normalizer changed.
        accuracy: share of the tokens that were the likeliest one.
        accuracy_at_5: share of the tokens that were among the 5 likeliest.
        by_position: by the number of tokens of the window that came before.
        by_frequency: by how often the token was to be predicted in the training split; None without that split.
        standard_errors: by the name of the figure, from a bootstrap over documents; None for a single document.
        num_resamples, seed: of the bootstrap.
        baselines: from the training split; None without it.
        totals: the sums of each document, for `paired_difference`.
    """

    evaluation: Evaluation
    byte_perplexity: float
    normalized_share: float
    accuracy: float
    accuracy_at_5: float
    calibration: Calibration
    by_position: LossByGroup
    by_frequency: LossByGroup | None
    by_document: LossByDocument
    standard_errors: Mapping[str, float] | None
    num_resamples: int
    seed: int
    baselines: Sequence[BaselineScore] | None
    totals: DocumentTotals


def evaluate_in_detail(
    model: Transformer,
    split: TokenizedSplit,
    sizes: Sizes,
    windows: Windows,
    protocol: Protocol,
    batch_size: int,
    train: TokenizedSplit | None = None,
    baselines: Mapping[str, Baseline] | None = None,
) -> DetailedEvaluation:
    """Scores a text.

    Args:
        model: on any device; it is left in the mode in which it came.
        split: the text.
        sizes: of its documents, from `document_sizes`.
        windows, protocol: from `training_windows` or `strided_windows`.
        batch_size: of the two averages over batches; nothing else depends on it.
        train: where the model's training counted tokens.
        baselines: models that were fitted to it.
    """
    start = time.perf_counter()
    scores = score(model, windows, protocol.once, baselines or {})
    totals = document_totals(scores, scores.losses, split, sizes)
    found = figures(totals.total)
    per_document = figures(totals)
    means = batch_means(scores, len(windows), batch_size)
    with np.errstate(over="ignore"):
        mean_batch_perplexity = float(np.exp(means).mean())
    evaluation = Evaluation(
        loss=float(found.loss),
        perplexity=float(found.perplexity),
        mean_batch_loss=float(means.mean()),
        mean_batch_perplexity=mean_batch_perplexity,
        bits_per_byte=float(found.bits_per_byte),
        word_perplexity=float(found.word_perplexity),
        num_tokens=len(scores.losses),
        num_windows=len(windows),
        num_batches=len(means),
        batch_size=batch_size,
        seconds=time.perf_counter() - start,
    )
    return DetailedEvaluation(
        evaluation=evaluation,
        byte_perplexity=float(found.byte_perplexity),
        normalized_share=float(sizes.num_changed_bytes.sum() / sizes.num_bytes.sum()),
        accuracy=float(found.accuracy),
        accuracy_at_5=float(found.accuracy_at_5),
        calibration=calibration(scores.confidences, scores.at_1),
        by_position=loss_by_position(scores, windows.context_size),
        by_frequency=None if train is None else loss_by_frequency(scores, train, model.vocab_size),
        by_document=LossByDocument(
            per_document.loss.tolist(),
            per_document.bits_per_byte.tolist(),
            totals.num_scored.tolist(),
            totals.num_bytes.tolist(),
        ),
        standard_errors=standard_errors(totals),
        num_resamples=NUM_RESAMPLES,
        seed=SEED,
        baselines=None if baselines is None else baseline_scores(scores, split, sizes),
        totals=totals,
    )


def batch_means(scores: Scores, num_windows: int, batch_size: int) -> np.ndarray:
    """The mean loss of each batch of windows."""
    batches = scores.windows // batch_size
    count = -(-num_windows // batch_size)
    return np.bincount(batches, scores.losses, minlength=count) / np.bincount(batches, minlength=count)


def calibration(confidences: np.ndarray, is_right: np.ndarray) -> Calibration:
    """The reliability table and its summary.

    Args:
        confidences: (S,) probability of the likeliest token, above 0.
        is_right: (S,) whether it was the token that came, 0 to 1.
    """
    # Bins are open below and closed above, as in the paper.
    bins = np.clip(np.ceil(confidences * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    confidence, right = (np.bincount(bins, values, minlength=NUM_BINS) for values in (confidences, is_right))
    with np.errstate(invalid="ignore"):
        return Calibration(
            float(np.abs(confidence - right).sum() / len(confidences)),
            counts.tolist(),
            (confidence / counts).tolist(),
            (right / counts).tolist(),
        )


def loss_by_position(scores: Scores, context_size: int) -> LossByGroup:
    """Groups by the number of tokens of the window that came before, from 1 to `context_size`."""
    return by_group(scores, scores.positions - 1, [str(position) for position in range(1, context_size + 1)])


def loss_by_frequency(scores: Scores, train: TokenizedSplit, vocab_size: int) -> LossByGroup:
    """Groups by the power of ten of the token's count among the targets of the training split, and never seen."""
    counts = target_counts(train.ids, train.offsets, vocab_size)
    # By the number of digits, which no rounding can get wrong; 0 has none.
    digits = np.array([len(str(count)) if count else 0 for count in counts.tolist()])
    names = ["0", *(f"{10**power:,} to {10 ** (power + 1) - 1:,}" for power in range(digits.max()))]
    return by_group(scores, digits[scores.tokens], names)


def by_group(scores: Scores, groups: np.ndarray, names: list[str]) -> LossByGroup:
    counts = np.bincount(groups, minlength=len(names))
    with np.errstate(invalid="ignore"):
        losses = np.bincount(groups, scores.losses, minlength=len(names)) / counts
    return LossByGroup(names, losses.tolist(), counts.tolist())


def baseline_scores(scores: Scores, split: TokenizedSplit, sizes: Sizes) -> list[BaselineScore]:
    found = []
    for name, losses in scores.baselines.items():
        total = figures(document_totals(scores, losses, split, sizes).total)
        found.append(BaselineScore(name, float(total.loss), float(total.perplexity), float(total.bits_per_byte)))
    return found
