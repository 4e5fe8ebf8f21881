"""The predictions of two models, token by token.

Shapes: B batch, T position, Vocab vocab_size, P predicted tokens, K positions with a prediction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lumiere.components.kernels import IGNORED, linear_cross_entropy_losses
from lumiere.components.short_repr import ShortRepr
from lumiere.data.batches import Batch
from lumiere.evaluation.scoring import DocumentTotals, PairedDifference, paired_difference
from lumiere.models.transformer import Transformer

LOGITS_AT_ONCE = 2**20
"""8 MB in float64."""


@dataclass(frozen=True)
class PredictionDiff(ShortRepr):
    """Of each predicted token, (P,), in float64 nats.

    Attributes:
        sequences: which sequence it stands in.
        positions: its position there: how many tokens come before.
        targets: its id.
        losses_a, losses_b: -ln p(token) by A and by B.
        kl_ab, kl_ba: of the whole predictions there, KL(A || B) and KL(B || A).
        same_choice: the probability that both choose the same token, if each chooses among its most probable ones.
        position_numbers: (K,) the positions that have predictions.
        kl_ab_by_position, kl_ba_by_position: (K,) the means there.
    """

    sequences: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    losses_a: np.ndarray
    losses_b: np.ndarray
    kl_ab: np.ndarray
    kl_ba: np.ndarray
    same_choice: np.ndarray
    position_numbers: np.ndarray
    kl_ab_by_position: np.ndarray
    kl_ba_by_position: np.ndarray

    @classmethod
    def join(cls, parts: "Sequence[PredictedTokens]") -> "PredictionDiff":
        """Those of all batches, one after the other."""
        first_rows = np.cumsum([0, *(part.num_sequences for part in parts[:-1])])
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("positions", "targets", "losses_a", "losses_b", "kl_ab", "kl_ba", "same_choice")
        }
        rows = [part.sequences + first for part, first in zip(parts, first_rows, strict=True)]
        numbers, places = np.unique(columns["positions"], return_inverse=True)
        counts = np.bincount(places)
        means = {f"{name}_by_position": np.bincount(places, columns[name]) / counts for name in ("kl_ab", "kl_ba")}
        return cls(sequences=np.concatenate(rows), **columns, position_numbers=numbers, **means)


@dataclass(frozen=True)
class PredictedTokens(ShortRepr):
    """The predicted tokens of one batch, as in `PredictionDiff`."""

    num_sequences: int
    sequences: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    losses_a: np.ndarray
    losses_b: np.ndarray
    kl_ab: np.ndarray
    kl_ba: np.ndarray
    same_choice: np.ndarray


def compare_predictions(batch: Batch, first_BTVocab: Tensor, second_BTVocab: Tensor) -> PredictedTokens:
    """What two models say about the targets of a batch, from their logits."""
    is_real_BT = batch.targets != IGNORED
    rows, columns = (index.cpu().numpy() for index in is_real_BT.nonzero(as_tuple=True))
    targets_P = batch.targets[is_real_BT].cpu()
    size = max(1, LOGITS_AT_ONCE // first_BTVocab.shape[-1])
    found: list[tuple[Tensor, ...]] = []
    chunks = (logits[is_real_BT].split(size) for logits in (first_BTVocab, second_BTVocab))
    for first, second, targets in zip(*chunks, targets_P.split(size), strict=True):
        log_p, log_q = (logits.cpu().double().log_softmax(-1) for logits in (first, second))
        ratio = log_p - log_q
        found.append(
            (
                -log_p.gather(1, targets[:, None])[:, 0],
                -log_q.gather(1, targets[:, None])[:, 0],
                (log_p.exp() * ratio).sum(-1),
                (log_q.exp() * -ratio).sum(-1),
                same_choices(log_p, log_q),
            )
        )
    values = [torch.cat(column).numpy() for column in zip(*found, strict=True)]
    return PredictedTokens(len(is_real_BT), rows, columns + 1, targets_P.numpy(), *values)


def same_choices(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(P,) 0 or 1 but where several tokens are tied for the first place: these share it."""
    tops_p, tops_q = (values == values.amax(-1, keepdim=True) for values in (log_p, log_q))
    return (tops_p & tops_q).sum(-1) / (tops_p.sum(-1) * tops_q.sum(-1))


def paired_losses(found: PredictionDiff, documents_S: np.ndarray) -> PairedDifference | None:
    """B's mean loss less A's, and how sure that is, by resampling the documents; None where there is but one.

    Args:
        documents_S: which document each sequence is cut from.
    """
    _, documents = np.unique(documents_S[found.sequences], return_inverse=True)
    base, other = (loss_totals(documents, losses) for losses in (found.losses_a, found.losses_b))
    return paired_difference(base, other, "loss")


def loss_totals(documents: np.ndarray, losses: np.ndarray) -> DocumentTotals:
    """The sums of each document; what a mean loss does not need is 0."""
    nats, counts = np.bincount(documents, losses), np.bincount(documents)
    unknown = np.zeros(len(nats))
    return DocumentTotals(nats, counts, unknown, unknown, counts, unknown, unknown, unknown)


def evaluation_error(model: Transformer, batch: Batch, losses_P: np.ndarray) -> float:
    """How far the first losses are from those of the fast path, relative to the largest."""
    with torch.inference_mode():
        residual = model.final_residual(batch.tokens)[batch.targets != IGNORED]
        targets_P = batch.targets[batch.targets != IGNORED]
        expected = linear_cross_entropy_losses(residual, model.token_embedding.weight, targets_P).cpu().double().numpy()
    return float(np.abs(losses_P[: len(expected)] - expected).max() / max(1.0, expected.max()))
