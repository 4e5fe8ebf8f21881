"""Detailed evaluation in one pass: averages, accuracy, calibration, loss by group, baselines and standard errors."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lumiere.components.short_repr import ShortRepr
from lumiere.data.batches import Windows
from lumiere.data.dataset import Sizes, TokenizedSplit
from lumiere.evaluation.loss import Evaluation
from lumiere.evaluation.ngrams import Baseline, target_counts
from lumiere.evaluation.scoring import (
    NUM_RESAMPLES,
    SEED,
    DocumentTotals,
    GroupSums,
    Protocol,
    Scores,
    document_totals,
    metrics,
    score,
    standard_errors,
)
from lumiere.models.transformer import Transformer

NUM_BINS = 15
"""Number of bins of the reliability table, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Calibration(ShortRepr):
    """Calibration of the top-1 probability against top-1 accuracy (Guo et al. 2017, arXiv:1706.04599).

    Attributes:
        ece: Expected calibration error: mean over tokens of |confidence - accuracy| of their bin (equation 3), with
            `NUM_BINS` bins of equal width.
        counts: Tokens per bin, from low to high confidence.
        confidences: Mean confidence per bin; NaN if empty.
        accuracies: Top-1 accuracy per bin; NaN if empty.
    """

    ece: float
    counts: list[int]
    confidences: list[float]
    accuracies: list[float]


@dataclass(frozen=True)
class LossByGroup(ShortRepr):
    """Mean loss per group of tokens, in nats; NaN for empty groups.

    Attributes:
        names: A position, or a range of counts.
        counts: Scored tokens per group.
    """

    names: list[str]
    losses: list[float]
    counts: list[int]


@dataclass(frozen=True)
class LossByDocument(ShortRepr):
    """Losses and sizes of the documents, in the order of the split."""

    losses: list[float]
    bits_per_byte: list[float]
    num_tokens: list[int]
    num_bytes: list[int]


@dataclass(frozen=True)
class BaselineScore:
    """Result of an n-gram baseline on the same tokens with the same contexts."""

    name: str
    loss: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class DetailedEvaluation(ShortRepr):
    """Result of `evaluate_in_detail`.

    Attributes:
        evaluation: The averages, as from `evaluate`.
        byte_perplexity: 2 to the power of the bits per byte.
        normalized_share: Fraction of the bytes of the text that the tokenizer's normalizer changed.
        accuracy: Top-1 accuracy.
        accuracy_at_5: Top-5 accuracy.
        by_position: Loss by number of preceding tokens in the window.
        by_frequency: Loss by how often the token is a target in the training split; None without that split.
        standard_errors: By metric, from a bootstrap over documents; None for a single document.
        num_resamples, seed: Parameters of the bootstrap.
        baselines: N-gram baselines fitted to the training split; None without it.
        totals: Sums per document, for `paired_difference`.
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
    """Score a text.

    Args:
        model: On any device. Its training mode is restored.
        split: The text.
        sizes: Sizes of its documents, from `document_sizes`.
        windows, protocol: From `training_windows` or `strided_windows`.
        batch_size: Windows per batch of the two averages over batches; nothing else depends on it.
        train: The split that the model was trained on, to group tokens by frequency.
        baselines: N-gram baselines fitted to it.
    """
    start = time.perf_counter()
    baselines = baselines or {}
    documents = GroupSums(split.facts.num_documents, 3 + len(baselines))
    batches = GroupSums(-(-len(windows) // batch_size), 1)
    positions = GroupSums(windows.context_size, 1)
    bins = GroupSums(NUM_BINS, 2)
    names, group_of = ([], np.empty(0)) if train is None else frequency_groups(train, model.vocab_size)
    frequencies = GroupSums(len(names), 1)

    def take(scores: Scores) -> None:
        losses = scores.losses
        documents.add(scores.documents, losses, scores.at_1, scores.at_5, *scores.baselines.values())
        batches.add(scores.windows // batch_size, losses)
        positions.add(scores.positions - 1, losses)
        bins.add(bins_of(scores.confidences), scores.confidences, scores.at_1)
        if names:
            frequencies.add(group_of[scores.tokens], losses)

    score(model, windows, protocol.once, baselines, take)
    nats, at_1, at_5, *baseline_nats = documents.sums
    totals = document_totals(split, sizes, protocol, documents.counts, nats, at_1, at_5)
    found = metrics(totals.total)
    per_document = metrics(totals)
    [means] = batches.means
    with np.errstate(over="ignore"):
        mean_batch_perplexity = float(np.exp(means).mean())
    evaluation = Evaluation(
        loss=float(found.loss),
        perplexity=float(found.perplexity),
        mean_batch_loss=float(means.mean()),
        mean_batch_perplexity=mean_batch_perplexity,
        bits_per_byte=float(found.bits_per_byte),
        word_perplexity=float(found.word_perplexity),
        num_tokens=int(documents.counts.sum()),
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
        calibration=calibration(bins),
        by_position=by_group(positions, [str(position) for position in range(1, windows.context_size + 1)]),
        by_frequency=by_group(frequencies, names) if names else None,
        by_document=LossByDocument(
            per_document.loss.tolist(),
            per_document.bits_per_byte.tolist(),
            totals.num_scored.tolist(),
            totals.num_bytes.tolist(),
        ),
        standard_errors=standard_errors(totals),
        num_resamples=NUM_RESAMPLES,
        seed=SEED,
        baselines=[
            baseline_score(name, totals._replace(nats=own)) for name, own in zip(baselines, baseline_nats, strict=True)
        ]
        or None,
        totals=totals,
    )


def frequency_groups(train: TokenizedSplit, vocab_size: int) -> tuple[list[str], np.ndarray]:
    """Group tokens by how often they are a target in the training split: never, or by powers of ten.

    Returns:
        Names of the groups, and the group of each token, (vocab_size,).
    """
    counts = target_counts(train.ids, train.offsets, vocab_size)
    # By number of digits, which is exact; 0 has none.
    digits = np.array([len(str(count)) if count else 0 for count in counts.tolist()])
    return ["0", *(f"{10**power:,} to {10 ** (power + 1) - 1:,}" for power in range(digits.max()))], digits


def bins_of(confidences: np.ndarray) -> np.ndarray:
    """Return the bin of each probability above 0: open below and closed above, as in the paper."""
    return np.clip(np.ceil(confidences * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)


def calibration(bins: GroupSums) -> Calibration:
    """Return the reliability table and its summary.

    Args:
        bins: Sums of the top-1 probability, and of whether it was right (0 to 1).
    """
    confidence, right = bins.sums
    means = bins.means.tolist()
    return Calibration(float(np.abs(confidence - right).sum() / bins.counts.sum()), bins.counts.tolist(), *means)


def by_group(sums: GroupSums, names: list[str]) -> LossByGroup:
    return LossByGroup(names, sums.means[0].tolist(), sums.counts.tolist())


def baseline_score(name: str, totals: DocumentTotals) -> BaselineScore:
    total = metrics(totals.total)
    return BaselineScore(name, float(total.loss), float(total.perplexity), float(total.bits_per_byte))
