"""Which tokens of a text a prediction depends on: integrated gradients, gradient times input, and occlusion.

Shapes: N row (a point of a path, or an occluded text), T position, E embedding_size, Vocab vocab_size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import hooked
from lumiere.interpret.result import Receipt, Result, float64, one_sequence, rounding, table
from lumiere.models.transformer import Transformer

MEAN, ZERO = "mean", "zero"
"""Baselines that are no token's embedding."""
QUADRATURES = ("gauss", "midpoint")
STEPS, DOUBLED_TO, MAX_STEPS = 50, 256, 4096
"""Points of the integral at first, up to which they double, and at most."""
COMPLETE = 0.01
"""The largest relative error of completeness."""
TOKENS_AT_ONCE = 1024
"""Of one pass: fewer make the products slow, more take memory."""

Score = Callable[[Tensor], Tensor]
"""Maps token embeddings, (N, T, E), to a number for each row, (N,)."""


@dataclass(frozen=True, kw_only=True)
class Saliency(Result):
    """How much each token contributes to a score: a logit difference, or a log-probability in nats.

    Attributes:
        tokens: (T,) the ids that the model was given.
        position: whose prediction is explained; later tokens contribute nothing.
        target: the token whose score is explained.
        versus: the token whose logit is subtracted; None: the score is the log-probability of the target.
        score: of the text.
        baseline: what every embedding is replaced by: `mean`, `zero` or the name of a token.
        baseline_score: of a text of baselines.
        quadrature: the rule of the integral.
        num_steps: its number of points.
        completeness_error: the sum of the integrated gradients minus (score - baseline_score).
        relative_error: its size over that of (score - baseline_score).
        integrated_gradients: (T,) they sum to (score - baseline_score).
        gradient_x_input: (T,) the gradient at the text times the embedding.
        occlusion: (T,) the score minus that of the text with this token replaced by the baseline.
        other_baseline: the second baseline.
        other_integrated_gradients: (T,) those from the second baseline.
        rank_correlation: Spearman's, of the integrated gradients from the two baselines, up to `position`; NaN where
            all are equal.
    """

    tokens: tuple[int, ...]
    position: int
    target: int
    versus: int | None
    score: float
    baseline: str
    baseline_score: float
    quadrature: str
    num_steps: int
    completeness_error: float
    relative_error: float
    integrated_gradients: np.ndarray
    gradient_x_input: np.ndarray
    occlusion: np.ndarray
    other_baseline: str
    other_integrated_gradients: np.ndarray
    rank_correlation: float

    def rows(self) -> Iterator[Mapping[str, Any]]:
        return table(
            {"position": range(len(self.tokens))},
            token=np.array(self.tokens),
            integrated_gradients=self.integrated_gradients,
            gradient_x_input=self.gradient_x_input,
            occlusion=self.occlusion,
            other_integrated_gradients=self.other_integrated_gradients,
        )


def saliency(
    model: Transformer,
    tokens: Sequence[int],
    baselines: Mapping[str, np.ndarray],
    position: int = -1,
    target: int | None = None,
    versus: int | None = None,
    log_probability: bool = False,
    quadrature: str = "gauss",
    num_steps: int = STEPS,
) -> Saliency:
    """Attribute a logit difference, or a log-probability, to the embeddings of the tokens.

    The score f is a function of the token embeddings E, (T, E); positions are added later and held fixed.

    - Integrated gradients (Sundararajan et al. 2017): `(E_t - B_t) . integral of df/dE_t at B + a (E - B) for a from 0
      to 1`, with the baseline B. They sum to f(E) - f(B); the number of points doubles until they do within 1%, up to
      256.
    - Gradient times input: `E_t . df/dE_t` at the text itself.
    - Occlusion (Zeiler & Fergus 2014): f(E) minus f with E_t replaced by B_t.

    The gradient is that of the activation: that of a tied embedding matrix would add its use as the output head.

    Args:
        tokens: (T,) ids, at most `context_size` of them.
        baselines: two by name; of each, the weight of every token in the average of embeddings, (Vocab,), such as the
            tokens' frequencies. All zero: the zero vector. The second is only compared with the first.
        position: whose prediction to explain.
        target: the token (None: the most probable).
        versus: the token whose logit is subtracted (None: the most probable other one).
        log_probability: explain ln p(target), which all logits change, instead of a difference of two.
        quadrature: one of `QUADRATURES`: Gauss-Legendre, or midpoints of equal parts.
        num_steps: points of the integral at first.
    """
    ids_1T, position = one_sequence(model, tokens), position % len(tokens)
    with torch.no_grad():
        logits_V = model(ids_1T).logits[0, position]
        end_TE = model.token_embedding(ids_1T)[0]
    first, second = logits_V[: model.num_tokens].topk(2).indices.tolist()
    wanted = first if target is None else target
    if log_probability:
        versus = None
    elif versus is None:
        versus = second if wanted == first else first
    metric = metric_of(wanted, versus)
    score = score_at(model, ids_1T, position, metric)
    (name, start_TE), (other_name, other_TE) = (
        (name, embedded(model, weights).expand_as(end_TE)) for name, weights in baselines.items()
    )
    with torch.no_grad():
        whole, of_baseline = float64(score(torch.stack([end_TE, start_TE]))).tolist()
    dropped_T = np.zeros(len(tokens))
    dropped_T[: position + 1] = whole - occluded_scores(score, start_TE, end_TE, position + 1)
    gap, scale = whole - of_baseline, 100 * rounding(model) * max(1.0, abs(whole))
    last = max(num_steps, DOUBLED_TO)
    while True:
        found_T = integrated_gradients(score, start_TE, end_TE, num_steps, quadrature)
        error = float(found_T.sum()) - gap
        relative = abs(error) / max(abs(gap), scale)  # a gap of nothing but rounding has no relative error
        if not relative > COMPLETE or num_steps == last:
            break
        num_steps = min(2 * num_steps, last)
    other_T = integrated_gradients(score, other_TE, end_TE, num_steps, quadrature)
    local_T = (gradients(score, end_TE[None])[0].double() * end_TE.double()).sum(-1).cpu().numpy()
    later = np.concatenate([values[position + 1 :] for values in (found_T, other_T, local_T)])
    plain = float(metric(logits_V[None]))
    return Saliency(
        tokens=tuple(tokens),
        position=position,
        target=wanted,
        versus=versus,
        score=whole,
        baseline=name,
        baseline_score=of_baseline,
        quadrature=quadrature,
        num_steps=num_steps,
        completeness_error=error,
        relative_error=relative,
        integrated_gradients=found_T,
        gradient_x_input=local_T,
        occlusion=dropped_T,
        other_baseline=other_name,
        other_integrated_gradients=other_T,
        rank_correlation=rank_correlation(found_T[: position + 1], other_T[: position + 1]),
        receipts=(
            Receipt("integrated gradients sum to the change of the score", relative, COMPLETE),
            Receipt(
                "the score is that of a plain forward pass", abs(whole - plain) / max(1.0, abs(whole)), rounding(model)
            ),
            Receipt("later tokens contribute nothing", float(np.abs(later).max(initial=0.0)), 0.0),
        ),
    )


def metric_of(target: int, versus: int | None) -> Callable[[Tensor], Tensor]:
    """Return the function of logits, (N, Vocab), that is explained."""
    if versus is None:
        return lambda logits_NV: logits_NV.log_softmax(-1)[:, target]
    return lambda logits_NV: logits_NV[:, target] - logits_NV[:, versus]


def score_at(model: Transformer, ids_1T: Tensor, position: int, metric: Callable[[Tensor], Tensor]) -> Score:
    """Return the metric at a position as a function of the token embeddings."""

    def score(embeddings_NTE: Tensor) -> Tensor:
        ids_NT = ids_1T.expand(len(embeddings_NTE), -1)
        is_real_NT = None if model.padding_id is None else ids_NT != model.padding_id
        with hooked(model, {"hook_embed": lambda _: embeddings_NTE}):
            final_NTE = model.final_residual(ids_NT, is_real_NT)
        return metric(model.unembed(final_NTE[:, position]))

    return score


def embedded(model: Transformer, weights_V: np.ndarray) -> Tensor:
    """Return the average of the embeddings, (E,), with these weights; zero if they all are."""
    total = float(weights_V.sum())
    if not total:
        return torch.zeros_like(model.token_embedding.weight[0])
    (chosen,) = weights_V.nonzero()
    matrix = model.token_embedding.weight.detach()
    shares = torch.from_numpy(weights_V[chosen] / total).to(matrix)
    return shares @ model.token_embedding(torch.from_numpy(chosen).to(matrix.device)).detach()


def integrated_gradients(
    score: Score, start_TE: Tensor, end_TE: Tensor, num_steps: int, quadrature: str = "gauss"
) -> np.ndarray:
    """Return (T,): `(end - start)` times the mean gradient of the score on the line between them."""
    if quadrature == "gauss":
        nodes, doubled = np.polynomial.legendre.leggauss(num_steps)
        places, shares = (nodes + 1) / 2, doubled / 2
    else:
        places, shares = (np.arange(num_steps) + 0.5) / num_steps, np.full(num_steps, 1 / num_steps)
    change_TE, mean_TE = end_TE - start_TE, torch.zeros(end_TE.shape, dtype=torch.float64)
    places_N11 = torch.from_numpy(places).to(end_TE)[:, None, None]
    at_once = rows_at_once(len(end_TE))
    for first in range(0, num_steps, at_once):
        gradients_NTE = gradients(score, start_TE + places_N11[first : first + at_once] * change_TE)
        shares_N = torch.from_numpy(shares[first : first + at_once])
        mean_TE += torch.einsum("n,nte->te", shares_N, gradients_NTE.cpu().double())
    return (mean_TE * change_TE.cpu().double()).sum(-1).numpy()


@torch.no_grad()
def occluded_scores(score: Score, start_TE: Tensor, end_TE: Tensor, count: int) -> np.ndarray:
    """Return the score with each of the first `count` rows of `end` replaced by that of `start`, (count,)."""
    found = []
    for places in torch.arange(count).split(rows_at_once(len(end_TE))):
        occluded_NTE = end_TE.repeat(len(places), 1, 1)
        occluded_NTE[range(len(places)), places] = start_TE[places]
        found.append(float64(score(occluded_NTE)))
    return np.concatenate(found)


def gradients(score: Score, embeddings_NTE: Tensor) -> Tensor:
    """Return the gradient of each row's score in its own embeddings, (N, T, E)."""
    leaf_NTE = embeddings_NTE.detach().requires_grad_()
    with torch.enable_grad():
        (found_NTE,) = torch.autograd.grad(score(leaf_NTE).sum(), leaf_NTE)
    return found_NTE


def rows_at_once(num_positions: int) -> int:
    return max(1, TOKENS_AT_ONCE // num_positions)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank; NaN where all are equal."""
    ranks = []
    for values in (a, b):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[group])
    a, b = (rank - rank.mean() for rank in ranks)
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else float("nan")
