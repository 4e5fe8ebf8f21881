"""Steer the model along a direction of its residual stream, at several doses, beside random directions.

Shapes: T position, E embedding_size, L layer, N text, P prompt, D dose, R placebo, W window, M rows at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import hooked, run_with_cache
from lumiere.components.kernels import IGNORED, linear_cross_entropy_losses
from lumiere.data.batches import Batch
from lumiere.errors import LumiereError
from lumiere.interpret.bootstrap import limits, resampled_counts
from lumiere.interpret.result import Receipt, Result, one_sequence, rounding
from lumiere.models.transformer import Transformer

DOSES = (-0.4, -0.2, -0.1, -0.05, -0.025, 0.0, 0.025, 0.05, 0.1, 0.2, 0.4)
"""In units of the stream's mean norm."""
LINEAR = 0.1
"""The largest dose of the regression for the slope at 0."""
TOKENS_AT_ONCE = 4096
LOSS_PLACEBOS = 5
"""Random directions whose loss is measured: it takes most of the time."""


def stream_after(model: Transformer, tokens: Sequence[int] | Tensor) -> Tensor:
    """Return the residual stream after each block, (L, B, T, E)."""
    tokens_BT = tokens if isinstance(tokens, Tensor) else one_sequence(model, tokens)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.num_layers)]
    _, cache = run_with_cache(model, tokens_BT, names)
    return torch.stack([cache[name] for name in names])


@torch.inference_mode()
def mean_norms(model: Transformer, batches: Sequence[Batch], first: int = 1) -> Tensor:
    """Return the mean norm of the residual stream after each block over all tokens from `first` on, (L,)."""
    total, count = torch.zeros(model.num_layers, dtype=torch.float64), 0
    for batch in batches:
        batch = batch.to(model.unembedding.device)
        is_real_BT = batch.is_real.clone()
        is_real_BT[:, :first] = False
        norms_LBT = stream_after(model, batch.tokens).norm(dim=-1)
        total += norms_LBT[:, is_real_BT].cpu().double().sum(1)
        count += int(is_real_BT.sum())
    return total / max(count, 1)


@torch.inference_mode()
def text_means(model: Transformer, texts: Sequence[Sequence[int]], first: int = 1) -> Tensor:
    """Return the mean of the stream after each block over each text's tokens from `first` on, (N, L, E), in float64."""
    means = [stream_after(model, text)[:, 0, first:].double().mean(1).cpu() for text in texts]
    return torch.stack(means)


@dataclass(frozen=True)
class Sets:
    """Texts that have what a direction is for, and texts that lack it: their means after one block."""

    positive: Tensor
    """(N, E)."""
    negative: Tensor
    """(N, E), of any number of texts."""

    @property
    def difference(self) -> Tensor:
        """The difference of means, (E,): contrastive activation addition (Panickssery et al. 2023, section 3)."""
        return self.positive.mean(0) - self.negative.mean(0)


def placebos(vector_E: Tensor, count: int, seed: int, sets: Sets | None = None) -> dict[str, Tensor]:
    """Draw directions of the norm of `vector_E`, (R, E) by kind.

    - `random`: Gaussian.
    - `halves`: the difference between the means of two random halves of one set, which has the covariance of the texts.
    - `shuffled`: the difference of means after the labels are permuted.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {"random": torch.randn(count, len(vector_E), generator=generator, dtype=torch.float64)}
    if sets is not None and min(len(sets.positive), len(sets.negative)) >= 4:
        pooled, size = torch.cat([sets.positive, sets.negative]), len(sets.positive)
        shuffled = [pooled[torch.randperm(len(pooled), generator=generator)] for _ in range(count)]
        drawn["shuffled"] = torch.stack([rows[:size].mean(0) - rows[size:].mean(0) for rows in shuffled])
        halves = []
        for number in range(count):
            rows = (sets.positive, sets.negative)[number % 2]
            rows = rows[torch.randperm(len(rows), generator=generator)]
            middle = len(rows) // 2
            halves.append(rows[:middle].mean(0) - rows[middle:].mean(0))
        drawn["halves"] = torch.stack(halves)
    norm = vector_E.double().norm()
    return {kind: rows * (norm / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)) for kind, rows in drawn.items()}


@dataclass(frozen=True, kw_only=True)
class Steering(Result):
    """The effect of a direction at each dose, beside placebos of the same norm.

    Attributes:
        method: how the direction was found, in words.
        layer: the block after which it is added.
        vector: (E,) the direction, of the norm with which it was found.
        norm: that norm.
        stream_norm: the mean norm of the residual stream after the block.
        stream_norms: (L,) the same after each block.
        metric: what is measured, in words.
        doses: (D,) in units of `stream_norm`.
        values: (P,) the metric of each prompt without steering.
        effects: (P, D) its change.
        means: (D,) the mean change; `low` and `high`: its interval over prompts, NaN for fewer than 8.
        slope: of the mean change at dose 0, by regression over doses up to `LINEAR`; `slope_low`, `slope_high`.
        wrong_sign: the share of prompts whose own slope has the other sign.
        placebo_kinds: (R,) random, shuffled or halves.
        placebo_effects: (R, D) the mean change.
        placebo_slopes: (R,).
        ranks: by kind, the place of the slope among those of the placebos by absolute value, from 1.
        losses: (D,) the loss on other text, in nats per token; NaN without any.
        placebo_losses: (D,) the mean over `LOSS_PLACEBOS` of the random directions.
    """

    method: str
    layer: int
    vector: np.ndarray
    norm: float
    stream_norm: float
    stream_norms: np.ndarray
    metric: str
    doses: np.ndarray
    values: np.ndarray
    effects: np.ndarray
    means: np.ndarray
    low: np.ndarray
    high: np.ndarray
    slope: float
    slope_low: float
    slope_high: float
    wrong_sign: float
    placebo_kinds: tuple[str, ...]
    placebo_effects: np.ndarray
    placebo_slopes: np.ndarray
    ranks: Mapping[str, int]
    losses: np.ndarray
    placebo_losses: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for column, dose in enumerate(self.doses):
            random = self.placebo_effects[np.array(self.placebo_kinds) == "random", column]
            yield {
                "dose": float(dose),
                "effect": float(self.means[column]),
                "low": float(self.low[column]),
                "high": float(self.high[column]),
                "random_low": float(random.min()),
                "random_high": float(random.max()),
                "loss": float(self.losses[column]),
                "random_loss": float(self.placebo_losses[column]),
            }


def slopes(doses_D: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Return the slope through 0 of (..., D) over the small doses, by least squares."""
    small = np.abs(doses_D) <= LINEAR + 1e-12
    return (effects[..., small] * doses_D[small]).sum(-1) / (doses_D[small] ** 2).sum()


class Doses:
    """The stream after a block, to which directions are added at doses.

    Args:
        unit: the norm of what dose 1 adds.
        first: the first position that is steered.
    """

    def __init__(self, model: Transformer, layer: int, unit: float, first: int) -> None:
        self.model, self.layer, self.unit, self.first = model, layer, unit, first

    def final(self, resid_BTE: Tensor, added_ME: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the normalized final stream, (m B, T, E), for parts of the M vectors, each added to all rows."""
        num_rows, num_positions = resid_BTE.shape[:2]
        at_once = max(1, TOKENS_AT_ONCE // (num_rows * num_positions))
        for begin in range(0, len(added_ME), at_once):
            part = slice(begin, begin + at_once)
            copies_MBTE = resid_BTE.expand(len(added_ME[part]), *resid_BTE.shape).clone()
            copies_MBTE[:, :, self.first :] += added_ME[part, None, None].to(resid_BTE)
            yield part, self.model.continue_from(copies_MBTE.flatten(0, 1), self.layer + 1)

    def added(self, directions_RE: Tensor, doses_D: Sequence[float]) -> Tensor:
        """Return what is added, (R D, E)."""
        unit_RE = directions_RE / directions_RE.norm(dim=1, keepdim=True)
        scales_D = torch.tensor(list(doses_D), dtype=unit_RE.dtype) * self.unit
        return (unit_RE[:, None] * scales_D[:, None]).flatten(0, 1)


def metric_of(logits_MV: Tensor, target: int, versus: int | None) -> Tensor:
    """Return the log-probability of a token, or its logit minus another's, (M,)."""
    if versus is None:
        return logits_MV.double().log_softmax(-1)[:, target]
    return logits_MV[:, target].double() - logits_MV[:, versus].double()


def steer(
    model: Transformer,
    vector_E: Tensor,
    layer: int,
    prompts: Sequence[Sequence[int]],
    target: int,
    versus: int | None = None,
    batches: Sequence[Batch] = (),
    norms_L: Tensor | None = None,
    sets: Sets | None = None,
    method: str = "given",
    metric: str = "metric",
    num_placebos: int = 20,
    seed: int = 0,
    first: int = 1,
    doses: Sequence[float] = DOSES,
) -> Steering:
    """Add a direction to the residual stream after a block, at all positions from `first` on.

    `r_l[t] + dose * mean‖r_l‖ * v / ‖v‖`, as in contrastive activation addition (Panickssery et al. 2023), but in units
    of the stream, so that doses of different directions are comparable. Nothing says that a direction means anything
    unless it does more than others of its norm, so placebos are steered along too (`placebos`).

    Args:
        prompts: texts, at whose last token the metric is read.
        target, versus: the metric is the target's log-probability, or its logit minus that of `versus`.
        batches: other text, for the loss; also for the norms.
        norms_L: mean norms of the stream after each block. Default: `mean_norms` of the batches, or of the prompts.
        sets: the texts that the direction comes from, for two more kinds of placebo.

    Raises:
        LumiereError: the direction has another width than the model, or is 0.
    """
    vector_E = vector_E.detach().double().cpu()
    if len(vector_E) != model.embedding_size:
        raise LumiereError(
            f"the direction has width {len(vector_E)}, the model {model.embedding_size}",
            "find a direction in this model",
        )
    if not float(vector_E.norm()) > 0:
        raise LumiereError("the direction is 0: both sets of texts look alike to the model", "give other texts")
    if norms_L is None:
        norms_L = mean_norms(model, batches, first)
    unit = float(norms_L[layer])
    drawn = placebos(vector_E, num_placebos, seed, sets)
    kinds = ["direction", *(kind for kind, rows in drawn.items() for _ in rows)]
    dosed = Doses(model, layer, unit, first)
    directions_RE = torch.cat([vector_E[None], *drawn.values()])
    added_ME = dosed.added(directions_RE, doses)
    doses_D, shape = np.array(doses), (len(kinds), len(doses))
    with torch.inference_mode():
        metrics, clean = [], []
        for prompt in prompts:
            resid_1TE = stream_after(model, prompt)[layer]
            values_M = torch.zeros(len(added_ME), dtype=torch.float64)
            for part, final_MTE in dosed.final(resid_1TE, added_ME):
                values_M[part] = metric_of(model.unembed(final_MTE[:, -1]), target, versus).cpu()
            metrics.append(values_M.view(shape).numpy())
            clean.append(float(metric_of(model.logits(one_sequence(model, prompt))[:, -1], target, versus)))
        losses_RD = mean_losses(dosed, batches, added_ME.view(*shape, -1)[: 1 + min(num_placebos, LOSS_PLACEBOS)])
        by_hook = hooked_metric(model, prompts[0], layer, added_ME[len(doses) - 1], first, target, versus)
    values_PRD, clean_P = np.stack(metrics), np.array(clean)
    effects_PRD = values_PRD - clean_P[:, None, None]
    slopes_PR = slopes(doses_D, effects_PRD)
    counts = resampled_counts(np.arange(len(prompts)), seed)
    low = high = np.full(len(doses), np.nan)
    slope_limits = np.full(2, np.nan)
    if counts is not None:
        weights_RP = counts / counts.sum(1, keepdims=True)
        low, high = limits((weights_RP @ effects_PRD[:, 0]).T, 0.95)
        slope_limits = limits(weights_RP @ slopes_PR[:, 0], 0.95)
    slopes_R = slopes_PR.mean(0)
    names = np.array(kinds)
    ranks = {kind: 1 + int((abs(slopes_R[names == kind]) >= abs(slopes_R[0])).sum()) for kind in drawn}
    zero = doses.index(0.0) if 0.0 in doses else None
    error_at_0 = 0.0 if zero is None else float(np.abs(effects_PRD[:, 0, zero]).max() / max(1, np.abs(clean_P).max()))
    error_by_hook = abs(by_hook - float(values_PRD[0, 0, -1])) / max(1.0, abs(by_hook))
    return Steering(
        method=method,
        layer=layer,
        vector=vector_E.numpy(),
        norm=float(vector_E.norm()),
        stream_norm=unit,
        stream_norms=norms_L.numpy(),
        metric=metric,
        doses=doses_D,
        values=clean_P,
        effects=effects_PRD[:, 0],
        means=effects_PRD[:, 0].mean(0),
        low=low,
        high=high,
        slope=float(slopes_R[0]),
        slope_low=float(slope_limits[0]),
        slope_high=float(slope_limits[1]),
        wrong_sign=float((np.sign(slopes_PR[:, 0]) != np.sign(slopes_R[0])).mean()),
        placebo_kinds=tuple(kinds[1:]),
        placebo_effects=effects_PRD[:, 1:].mean(0),
        placebo_slopes=slopes_R[1:],
        ranks=ranks,
        losses=losses_RD[0],
        placebo_losses=losses_RD[1:].mean(0),
        receipts=(
            Receipt("dose 0 changes nothing", error_at_0, rounding(model)),
            Receipt("the largest dose, by a hook in a whole forward pass", error_by_hook, rounding(model)),
        ),
    )


def mean_losses(dosed: Doses, batches: Sequence[Batch], added_RDE: Tensor) -> np.ndarray:
    """Return the mean loss on the batches with each vector added, (R, D); NaN without batches."""
    added_ME = added_RDE.flatten(0, 1)
    sums, count = torch.zeros(len(added_ME), dtype=torch.float64), 0
    for batch in batches:
        batch = batch.to(dosed.model.unembedding.device)
        is_real_BT = batch.targets != IGNORED
        resid_BTE = stream_after(dosed.model, batch.tokens)[dosed.layer]
        for part, final_RTE in dosed.final(resid_BTE, added_ME):
            copies = len(added_ME[part])
            targets = batch.targets.repeat(copies, 1)[is_real_BT.repeat(copies, 1)]
            losses = linear_cross_entropy_losses(
                final_RTE[is_real_BT.repeat(copies, 1)], dosed.model.unembedding, targets
            )
            sums[part] += losses.view(copies, -1).sum(1).cpu().double()
        count += batch.num_targets
    return (sums / count if count else torch.full_like(sums, torch.nan)).view(added_RDE.shape[:2]).numpy()


def hooked_metric(
    model: Transformer, prompt: Sequence[int], layer: int, added_E: Tensor, first: int, target: int, versus: int | None
) -> float:
    """Return the metric with a vector added by a hook, in a whole forward pass."""

    def add(resid_BTE: Tensor) -> Tensor:
        resid_BTE = resid_BTE.clone()
        resid_BTE[:, first:] += added_E.to(resid_BTE)
        return resid_BTE

    with hooked(model, {f"blocks.{layer}.hook_resid_post": add}):
        return float(metric_of(model.logits(one_sequence(model, prompt))[:, -1], target, versus))
