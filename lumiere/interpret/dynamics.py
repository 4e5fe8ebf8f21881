"""Follow the numbers of other analyses along the snapshots of a run, and find phase changes.

Shapes: N snapshot, M series (one for each metric and each of its heads, pairs of heads or matrices), P point of the
training loss curve.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from lumiere.components.kernels import IGNORED, linear_cross_entropy_losses
from lumiere.data.batches import Batch, documents_of
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret.head_scores import (
    COMPOSITION_KINDS,
    SCORES,
    Composition,
    HeadScores,
    TextWindows,
    composition_scores,
    score_heads,
)
from lumiere.interpret.logit_lens import logit_lens
from lumiere.interpret.result import Receipt, Result, largest_difference, table
from lumiere.interpret.summary import matrix_facts
from lumiere.models.transformer import Transformer

SPAN = 0.5
"""The shortest stretch over which a slope is taken, in doublings of the step: over less, late noise looks steep."""
STEEPNESS = 6.0
"""The least slope of the steepest stretch, over log2 steps, as a multiple of the median of the others."""
FASTER = 2.0
"""The least rate of the change, over steps, as a multiple of the rate just before and just after it."""
LEVEL = 0.18
"""The largest departure from the values at its start and end, as a share of the change per doubling of the step."""
LONGEST = 1.0
"""The longest change, in doublings of the step; where snapshots are further apart, two intervals between them."""
AFTER = 0.5
"""The shortest rest of the curve after the change, as a share of the steps that the change took."""
SURE = 4.0
"""The smallest change in standard errors."""
LEAST_VALUES = 4
"""Curves of fewer values are not searched."""
KEPT = 0.8
"""The share of the steepest stretch's change that has to lie between the ends that are reported."""


@dataclass(frozen=True)
class PhaseChange:
    """A fast change between two levels.

    Attributes:
        first, last: the snapshots where it starts and ends, by index.
        change: of the value from the one to the other.
        slope: change per doubling of the step.
    """

    first: int
    last: int
    change: float
    slope: float


def find_phase_change(
    steps_N: np.ndarray, values_N: np.ndarray, noticeable: float, errors_N: np.ndarray | None = None
) -> PhaseChange | None:
    """Return the phase change of a curve, or None if none can be claimed.

    The search starts from the steepest stretch over log2(1 + step), among all that start at a snapshot and end at the
    first one half a doubling later. It must be six times as steep as the median of the stretches that do not overlap
    it. Candidates are the pairs of snapshots around it that are at most a doubling apart, or two intervals, and contain
    80 % of its change. A candidate is a phase change if

    - the value changes by `noticeable` and by four standard errors, where these are known;
    - over steps, it is twice as fast as the curve is just before and just after, for as many steps as it took itself;
    - before and after, the curve stays within 18 % of the change per doubling from where the change starts and ends,
      and within 18 % in the doubling next to it;
    - the curve continues for half as many steps as the change took.

    A straight line fails the second and third condition: it is steepest at its end over log steps, but as fast before.
    The candidate that is fastest over steps is returned. Curves of fewer than four values have no phase change.

    Olsson et al. 2022, "In-context Learning and Induction Heads", call the formation of induction heads a phase change
    and mark it by eye; this rule is our own. `benchmarks/phases.py` measures how often it is wrong.

    Args:
        steps_N: rising.
        values_N: NaN where the value is unknown.
        noticeable: the smallest change to report, in the unit of the values.
        errors_N: standard errors of the values, NaN where unknown.
    """
    places = np.flatnonzero(np.isfinite(values_N))
    if len(places) < LEAST_VALUES:
        return None
    steps, values = steps_N[places].astype(float), values_N[places]
    positions = np.log2(1.0 + steps)
    firsts, lasts = stretches(positions)
    slopes = (values[lasts] - values[firsts]) / (positions[lasts] - positions[firsts])
    steepest = int(np.abs(slopes).argmax())
    start, end = int(firsts[steepest]), int(lasts[steepest])
    others = np.abs(slopes[(lasts <= start) | (firsts >= end)])
    if not len(others) or abs(slopes[steepest]) < STEEPNESS * np.median(others):
        return None
    rising = values * np.sign(slopes[steepest])
    errors = np.zeros(len(places)) if errors_N is None else np.nan_to_num(errors_N[places])
    least = max(noticeable, KEPT * float(rising[end] - rising[start]))
    found = [
        ((rising[last] - rising[first]) / (steps[last] - steps[first]), first, last)
        for first, last in candidates(steps, positions, start, end)
        if rising[last] - rising[first] >= max(least, SURE * float(np.hypot(errors[first], errors[last])))
        and is_faster(steps, positions, rising, first, last)
        and is_between_levels(positions, rising, first, last)
    ]
    if not found:
        return None
    _, first, last = max(found)
    change = float(values[last] - values[first])
    slope = change / float(positions[last] - positions[first])
    return PhaseChange(int(places[first]), int(places[last]), change, slope)


def candidates(steps_N: np.ndarray, positions_N: np.ndarray, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of snapshots that overlap a stretch, are close enough, and have enough snapshots around them."""
    for first in range(1, end):
        for last in range(max(first, start) + 1, len(steps_N) - 1):
            if last > first + 2 and positions_N[last] - positions_N[first] > LONGEST:
                break
            if steps_N[-1] - steps_N[last] >= AFTER * (steps_N[last] - steps_N[first]):
                yield first, last


def is_faster(steps_N: np.ndarray, positions_N: np.ndarray, values_N: np.ndarray, first: int, last: int) -> bool:
    """Return whether a curve changes faster, over steps, between two snapshots than before and after them."""

    def rate(start: int, end: int) -> float:
        return abs(values_N[end] - values_N[start]) / (steps_N[end] - steps_N[start])

    length = steps_N[last] - steps_N[first]
    # Before and after, over as many steps and at least over half a doubling, as far as the curve goes.
    earlier = (positions_N <= positions_N[first] - SPAN) & (steps_N <= steps_N[first] - length)
    later = (positions_N >= positions_N[last] + SPAN) & (steps_N >= steps_N[last] + length)
    before = int(np.flatnonzero(earlier)[-1]) if earlier.any() else 0
    after = int(np.flatnonzero(later)[0]) if later.any() else len(steps_N) - 1
    return rate(first, last) >= FASTER * max(rate(before, first), rate(last, after))


def is_between_levels(positions_N: np.ndarray, values_N: np.ndarray, first: int, last: int) -> bool:
    """Return whether a curve, before and after a change, stays near the values at its start and end."""
    tolerance = LEVEL * (values_N[last] - values_N[first])

    def stays(part: slice, end: int) -> bool:
        doublings = np.maximum(np.abs(positions_N[part] - positions_N[end]), 1)
        return bool((np.abs(values_N[part] - values_N[end]) <= tolerance * doublings).all())

    return stays(slice(first), first) and stays(slice(last, None), last)


def stretches(positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each stretch starts and ends: at the first snapshot `SPAN` later; the last snapshots start none."""
    lasts = np.searchsorted(positions_N, positions_N + SPAN - 1e-9)
    firsts = np.flatnonzero(lasts < len(positions_N))
    return firsts, lasts[firsts]


DEFAULT_METRICS = (
    "validation-loss",
    "in-context-score",
    "repeat-gap",
    "text-repeat-gap",
    "previous",
    "induction",
    "text-induction",
    "k-composition",
)


@dataclass(frozen=True)
class Texts:
    """The inputs that are the same for all snapshots.

    Attributes:
        tokens: (N, T) ids for the head scores and the repeat gap, such as `repeated_tokens`.
        windows: for the in-context-learning score and natural repeats, as `score_heads` takes them; None: there are
            none.
        batches: for the validation loss; empty without a corpus.
        lens_rows: texts whose decision depths are averaged.
        averaged: the tokens that copying is computed over; None: all.
    """

    tokens: torch.Tensor
    windows: TextWindows | None = None
    batches: Sequence[Batch] = ()
    lens_rows: Sequence[Sequence[int]] = ()
    averaged: Sequence[int] | None = None


AnyResult = TypeVar("AnyResult", bound=Result)


@dataclass
class SnapshotMetrics:
    """One snapshot and the analyses of several metrics, each computed once when it is first needed; their receipts."""

    model: Transformer
    texts: Texts
    receipts: list[Receipt] = field(default_factory=list)

    def checked(self, result: AnyResult) -> AnyResult:
        """Keep the receipts of a result and return it."""
        self.receipts.extend(result.receipts)
        return result

    @cached_property
    def heads(self) -> HeadScores:
        return self.checked(score_heads(self.model, self.texts.tokens, self.texts.windows, self.texts.averaged))

    @cached_property
    def composition(self) -> Composition:
        return self.checked(composition_scores(self.model))

    @cached_property
    def matrices(self) -> Mapping[str, Any]:
        return matrix_facts(self.model)


class Measured(NamedTuple):
    """What a metric is at one snapshot."""

    values: Mapping[str, float]
    """By place: a head, a pair of heads, a matrix; under the empty name a number of the whole model."""
    baseline: float = math.nan
    """The value by chance; NaN if it is unknown."""
    error: float = math.nan
    """The standard error of a number of the whole model; NaN if it is unknown."""


@dataclass(frozen=True)
class Metric:
    """A number of the model, or one for each head, pair of heads or matrix.

    Attributes:
        name: on the command line.
        meaning: in words.
        unit: of the values: share, nats, stages; or what they are a multiple or a number of.
        noticeable: the least change that can be a phase change.
        measure: takes it from a snapshot.
        needs_corpus: whether it is a number of the validation split.
        needs_tokens: whether it is a result of `score_heads`, which reads the tokens of `Texts`.
        zero_is_missing: whether a value of 0 is that of a matrix of zeros, which has no level to rise from.
    """

    name: str
    meaning: str
    unit: str
    noticeable: float
    measure: Callable[[SnapshotMetrics], Measured]
    needs_corpus: bool = False
    needs_tokens: bool = False
    zero_is_missing: bool = False


def validation_loss(snapshot: SnapshotMetrics) -> Measured:
    """Return the mean loss over all targets, summed in float64, and its standard error, clustered by document."""
    weight, batches, sums = snapshot.model.unembedding, snapshot.texts.batches, []
    for batch in batches:
        with torch.inference_mode():
            residual = snapshot.model.final_residual(batch.tokens.to(weight.device)).flatten(0, 1)
            targets = batch.targets.flatten().to(weight.device)
            losses = linear_cross_entropy_losses(residual, weight, targets).cpu().double().view(batch.targets.shape)
        sums.append(losses.where(batch.targets != IGNORED, 0.0).sum(1).numpy())
    counts = np.concatenate([(batch.targets != IGNORED).sum(1).numpy() for batch in batches])
    (mean,), (error,) = clustered_means(np.concatenate(sums)[None], counts, documents_of(batches))
    return Measured({"": float(mean)}, float(np.log(snapshot.model.vocab_size)), float(error))


def loss_metric(name: str, meaning: str, fields: tuple[str, str], *, needs_corpus: bool) -> Metric:
    """Return the metric of a difference of losses and its standard error, two fields of `HeadScores`."""

    def measure(snapshot: SnapshotMetrics) -> Measured:
        value, error = (float(getattr(snapshot.heads, name)) for name in fields)
        return Measured({"": value}, 0.0, error)

    return Metric(name, meaning, "nats", 0.1, measure, needs_corpus, needs_tokens=True)


def score_metric(name: str, meaning: str, number: int, prefix: str = "") -> Metric:
    """Return the metric of a score of `HeadScores`; at natural repeats with the prefix `text_`."""

    def measure(snapshot: SnapshotMetrics) -> Measured:
        scores, uniform = (getattr(snapshot.heads, f"{prefix}{part}") for part in ("scores", "uniform"))
        return Measured({}) if scores is None else Measured(by_head(scores[..., number]), float(uniform[number]))

    return Metric(name, meaning, "share", 0.1, measure, needs_corpus=bool(prefix), needs_tokens=True)


def by_head(values_LH: np.ndarray) -> Mapping[str, float]:
    return {f"L{layer}H{head}": float(values_LH[layer, head]) for layer, head in np.ndindex(*values_LH.shape)}


def composition_metric(number: int, kind: str) -> Metric:
    def measure(snapshot: SnapshotMetrics) -> Measured:
        result = snapshot.composition
        labels = (f"L{a}H{b}>L{c}H{d}" for a, b, c, d in result.pairs.tolist())
        return Measured(dict(zip(labels, (result.scores[:, number] / result.chance).tolist(), strict=True)), 1.0)

    meaning = f"{kind.upper()}-composition of a head with a later one, as a multiple of chance"
    return Metric(f"{kind}-composition", meaning, "x chance", 0.5, measure)


def lens_depth(snapshot: SnapshotMetrics) -> Measured:
    lenses = [snapshot.checked(logit_lens(snapshot.model, row)) for row in snapshot.texts.lens_rows]
    return Measured({"": float(np.concatenate([lens.decision_stages for lens in lenses]).mean())})


def matrix_metric(name: str, meaning: str, unit: str, noticeable: float) -> Metric:
    def measure(snapshot: SnapshotMetrics) -> Measured:
        labels = [label.removesuffix(".weight").removeprefix("blocks.") for label in snapshot.matrices["matrices"]]
        return Measured(dict(zip(labels, snapshot.matrices[f"{name.replace('-', '_')}s"].tolist(), strict=True)))

    return Metric(name, meaning, unit, noticeable, measure, zero_is_missing=True)


SOURCES = {
    "previous": "the token before",
    "current": "the token itself",
    "first": "the first token",
    "duplicate": "earlier places of the same token",
    "induction": "what came after earlier places of the same token",
}
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("validation-loss", "mean loss on validation windows", "nats", 0.1, validation_loss, needs_corpus=True),
        loss_metric(
            "in-context-score",
            "loss late in a validation window minus loss early in it",
            ("in_context_score", "in_context_error"),
            needs_corpus=True,
        ),
        loss_metric(
            "repeat-gap",
            "loss of random tokens minus their loss when repeated",
            ("repeat_gap", "repeat_gap_error"),
            needs_corpus=False,
        ),
        *(
            score_metric(name, f"share of a head's attention that goes to {SOURCES[name]}", number)
            for number, name in enumerate(SCORES)
        ),
        loss_metric(
            "text-repeat-gap",
            "loss of names at their first occurrence in a validation window minus their loss when repeated",
            ("text_gap", "text_gap_error"),
            needs_corpus=True,
        ),
        score_metric(
            "text-induction",
            "share of a head's attention at repeated names of a validation window that goes to what came after",
            SCORES.index("induction"),
            "text_",
        ),
        Metric(
            "copying",
            "how much more probable a head makes the tokens that it attends to, from its weights",
            "from -1 to 1",
            0.2,
            lambda snapshot: Measured(by_head(snapshot.heads.copying), 0.0),
            needs_tokens=True,
        ),
        *(composition_metric(number, kind) for number, kind in enumerate(COMPOSITION_KINDS)),
        Metric(
            "lens-depth",
            "mean stage from which on the logit lens has the model's final token on top",
            "stages",
            0.25,
            lens_depth,
            needs_corpus=True,
        ),
        matrix_metric("norm", "Frobenius norm of a matrix", "", 1.0),
        matrix_metric("spectral-norm", "largest singular value of a matrix", "", 0.5),
        matrix_metric("effective-rank", "effective rank of a matrix", "ranks", 2.0),
        matrix_metric("stable-rank", "stable rank of a matrix", "ranks", 1.0),
    )
}
"""All metrics by name."""


NEAR_UNIFORM = 0.1
"""The largest difference of an untrained head's score from that of uniform attention."""
NEAR_NOTHING = 0.1
"""The largest repeat gap of an untrained model, in nats."""


@dataclass(frozen=True, kw_only=True)
class Dynamics(Result):
    """Metrics along the snapshots of a run.

    Attributes:
        steps: (N,) of the snapshots, rising.
        metrics: (M,) the metric of each series.
        places: (M,) its head (L1H0), pair of heads (L0H1>L1H0) or matrix; empty for a number of the whole model.
        units: (M,) of its values.
        values: (M, N); NaN if there is no such number, as for a head that writes nothing.
        errors: (M, N) standard errors of the values; NaN if unknown.
        baselines: (M,) the value by chance; NaN if it is unknown.
        phase_starts, phase_ends: (M,) the steps between which its phase change lies, or -1 without one.
        phase_sizes: (M,) change of the value between them; NaN without one.
        num_tried: series that were searched for a phase change; the others have too few values.
        curve_steps, curve_losses: (P,) the training loss, as it was logged by the training run.
    """

    steps: np.ndarray
    metrics: tuple[str, ...]
    places: tuple[str, ...]
    units: tuple[str, ...]
    values: np.ndarray
    errors: np.ndarray
    baselines: np.ndarray
    phase_starts: np.ndarray
    phase_ends: np.ndarray
    phase_sizes: np.ndarray
    num_tried: int
    curve_steps: np.ndarray
    curve_losses: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for metric, place, values, start, end in zip(
            self.metrics, self.places, self.values, self.phase_starts, self.phase_ends, strict=True
        ):
            in_phase = (start >= 0) & (start <= self.steps) & (self.steps <= end)
            rows = table({"step": self.steps.tolist()}, value=values, in_phase_change=in_phase)
            yield from ({"metric": metric, "place": place, **row} for row in rows)

    def series_of(self, metric: str) -> list[int]:
        """Return the series of a metric, ordered by their change from the first to the last value."""
        found = [number for number, name in enumerate(self.metrics) if name == metric]
        return sorted(found, key=lambda number: -abs(total_change(self.values[number])))


def total_change(values_N: np.ndarray) -> float:
    """Return the last finite value minus the first; 0 if there is none."""
    numbers = values_N[np.isfinite(values_N)]
    return float(numbers[-1] - numbers[0]) if len(numbers) else 0.0


def follow(
    steps: Sequence[int],
    load: Callable[[int], Transformer],
    metrics: Sequence[str],
    texts: Texts,
    curve: Sequence[tuple[int, float]] = (),
    emit: Callable[[int], None] = lambda number: None,
    from_scratch: bool = True,
) -> Dynamics:
    """Compute each metric at each snapshot. Each snapshot is loaded once, and each analysis computed once.

    As Olsson et al. 2022, "In-context Learning and Induction Heads", do with head scores and losses, on snapshots that
    are spaced as in Biderman et al. 2023, "Pythia". Phase changes are those of `find_phase_change`.

    Args:
        steps: of the snapshots, rising, at least one.
        load: returns the model at a step, in evaluation mode.
        metrics: names of `METRICS`, without those that need a corpus where `texts` has none.
        texts: the inputs of all snapshots.
        curve: (P,) steps and losses of the training run.
        emit: called with the number of snapshots done.
        from_scratch: whether the model of step 0 is untrained, which its metrics must show.
    """
    chosen = [METRICS[name] for name in metrics]
    found, worst = [], {}
    for number, step in enumerate(steps):
        snapshot = SnapshotMetrics(load(step), texts)
        found.append({metric.name: metric.measure(snapshot) for metric in chosen})
        for receipt in [*snapshot.receipts, *(untrained(snapshot, found[-1]) if step == 0 and from_scratch else ())]:
            worst[receipt.check] = worse(receipt, worst.get(receipt.check))
        emit(number + 1)
    last = SnapshotMetrics(load(steps[-1]), texts)
    again = {metric.name: metric.measure(last) for metric in chosen}
    series = [(metric, place) for metric in chosen for place in found[0][metric.name].values]
    steps_N, shape = np.array(steps), (len(series), len(steps))
    values_MN, errors_MN = np.empty(shape), np.empty(shape)
    for row, (metric, place) in enumerate(series):
        values_MN[row] = [measured[metric.name].values[place] for measured in found]
        errors_MN[row] = [measured[metric.name].error for measured in found]
    again_M = np.array([again[metric.name].values[place] for metric, place in series])
    is_missing_M1 = np.array([metric.zero_is_missing for metric, _ in series], dtype=bool)[:, None]
    curves_MN = np.where(is_missing_M1 & (values_MN == 0), np.nan, values_MN)
    phases = [
        find_phase_change(steps_N, curve_N, metric.noticeable, errors_N)
        for curve_N, errors_N, (metric, _) in zip(curves_MN, errors_MN, series, strict=True)
    ]
    return Dynamics(
        steps=steps_N,
        metrics=tuple(metric.name for metric, _ in series),
        places=tuple(place for _, place in series),
        units=tuple(metric.unit for metric, _ in series),
        values=values_MN,
        errors=errors_MN,
        baselines=np.array([again[metric.name].baseline for metric, _ in series]),
        phase_starts=np.array([-1 if phase is None else steps[phase.first] for phase in phases], dtype=int),
        phase_ends=np.array([-1 if phase is None else steps[phase.last] for phase in phases], dtype=int),
        phase_sizes=np.array([np.nan if phase is None else phase.change for phase in phases]),
        num_tried=int((np.isfinite(curves_MN).sum(1) >= LEAST_VALUES).sum()),
        curve_steps=np.array([step for step, _ in curve], dtype=int),
        curve_losses=np.array([loss for _, loss in curve], dtype=float),
        receipts=(
            Receipt("the last snapshot, loaded and analysed alone", largest_difference(values_MN[:, -1], again_M), 0.0),
            *worst.values(),
        ),
    )


def worse(receipt: Receipt, other: Receipt | None) -> Receipt:
    """Return the receipt with the larger error; NaN counts as larger than any number."""
    return receipt if other is None or not receipt.error <= other.error else other


def untrained(snapshot: SnapshotMetrics, found: Mapping[str, Measured]) -> Iterator[Receipt]:
    """Yield what must hold before the first update, for the metrics that were measured."""
    scores = [found[name] for name in SCORES if name in found]
    errors = [abs(x - score.baseline) for score in scores for x in score.values.values() if np.isfinite(x)]
    if errors:
        yield Receipt("at step 0 heads look at all tokens alike", max(errors), NEAR_UNIFORM)
    gap = found["repeat-gap"].values[""] if "repeat-gap" in found else math.nan
    if math.isfinite(gap):
        yield Receipt("at step 0 there is no repeat gap", abs(gap), NEAR_NOTHING)
        # Of different tokens: an untrained model with a tied output predicts that each token repeats at once, and so is
        # better than chance at text in which that happens.
        model, losses = snapshot.model, snapshot.heads.losses
        error = abs(float(losses[: len(losses) // 2].mean()) - math.log(model.vocab_size))
        # Logits of weights N(0, 0.02^2) on a stream of norm sqrt(E) have a variance of 0.02^2 E, half of which is loss.
        tolerance = NEAR_NOTHING + 0.02**2 * model.embedding_size
        yield Receipt("at step 0 different tokens have the loss of chance", error, tolerance)
