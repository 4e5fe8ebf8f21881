"""How a model came about: any number of the other analyses along the snapshots of its training.

Shapes: N snapshot, M series (one for each metric and each head, pair of heads or matrix that it has a value for), P
point of the training's loss curve.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumiere.interpret.metrics import METRICS, Metric, Subject, Texts
from lumiere.interpret.phases import LEAST_VALUES, find_phase_change
from lumiere.interpret.result import Receipt, Result
from lumiere.models.transformer import Transformer

NEAR_UNIFORM = 0.1
"""How far an untrained head's score may be from that of a head that looks at all tokens alike."""
NEAR_NOTHING = 0.1
"""How many nats an untrained model may gain or lose where a trained one learns to look back."""


@dataclass(frozen=True, kw_only=True)
class Dynamics(Result):
    """Values along a training.

    Attributes:
        steps: (N,) of the snapshots, rising.
        metrics: (M,) the metric of each series.
        places: (M,) its head (L1H0), pair of heads (L0H1>L1H0) or matrix; empty for a number of the whole model.
        units: (M,) of its values.
        values: (M, N); NaN where there is no such number, as of a head that writes nothing.
        errors: (M, N) standard errors of the values; NaN where they are not known.
        baselines: (M,) what chance gives; NaN where nothing can be said.
        phase_starts, phase_ends: (M,) the steps between which its phase change lies, or -1 where none is claimed.
        phase_sizes: (M,) change of the value between them; NaN where none is claimed.
        num_tried: series that were searched for a phase change; the others have too few values.
        curve_steps, curve_losses: (P,) the training loss, as it was measured while training, to stand beside.
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
        for series, (metric, place) in enumerate(zip(self.metrics, self.places, strict=True)):
            start, end = int(self.phase_starts[series]), int(self.phase_ends[series])
            for step, value in zip(self.steps.tolist(), self.values[series].tolist(), strict=True):
                in_phase = start >= 0 and start <= step <= end
                yield {"metric": metric, "place": place, "step": step, "value": value, "in_phase_change": in_phase}

    def series_of(self, metric: str) -> list[int]:
        """The series of a metric, those first that changed most from their first to their last value."""
        found = [number for number, name in enumerate(self.metrics) if name == metric]
        return sorted(found, key=lambda number: -abs(total_change(self.values[number])))


def total_change(values_N: np.ndarray) -> float:
    """The last number less the first, 0 where there are none."""
    numbers = values_N[np.isfinite(values_N)]
    return float(numbers[-1] - numbers[0]) if len(numbers) else 0.0


def follow(
    steps: Sequence[int],
    load: Callable[[int], Transformer],
    metrics: Sequence[str],
    texts: Texts,
    curve: Sequence[tuple[int, float]] = (),
    tell: Callable[[int], None] = lambda number: None,
) -> Dynamics:
    """Each metric at each snapshot. A snapshot is loaded once, and each analysis made once, whatever asks for it.

    Olsson et al. 2022, "In-context Learning and Induction Heads", follow head scores and losses so; Biderman et al.
    2023, "Pythia", keep the snapshots so. Phase changes are those of `find_phase_change`.

    Args:
        steps: of the snapshots, rising, at least one.
        load: gives the model at a step, in evaluation mode.
        metrics: names of `METRICS`, without those that need a corpus where `texts` has none.
        texts: what all snapshots are given.
        curve: (P) steps and losses of the training.
        tell: called with the number of snapshots done.
    """
    chosen = [METRICS[name] for name in metrics]
    columns, errors, worst = [], [], {}
    for number, step in enumerate(steps):
        subject = Subject(load(step), texts)
        columns.append(measure(subject, chosen))
        errors.append({metric.name: metric.error(subject) for metric in chosen})
        found = [*subject.receipts, *(untrained(subject, chosen) if step == 0 else ())]
        for receipt in found:
            worst[receipt.law] = worse(receipt, worst.get(receipt.law))
        tell(number + 1)
    last = Subject(load(steps[-1]), texts)
    labels = list(columns[0])
    values_MN = np.array([[column[label] for column in columns] for label in labels]).reshape(len(labels), len(steps))
    errors_MN = np.array([[found[name] for found in errors] for name, _ in labels]).reshape(values_MN.shape)
    again_M = np.array(list(measure(last, chosen).values()))
    steps_N = np.array(steps)
    curves = [searched(METRICS[name], values_MN[row]) for row, (name, _) in enumerate(labels)]
    phases = [
        find_phase_change(steps_N, curves[row], METRICS[name].noticeable, errors_MN[row])
        for row, (name, _) in enumerate(labels)
    ]
    baselines = {metric.name: metric.baseline(last) for metric in chosen}
    return Dynamics(
        steps=steps_N,
        metrics=tuple(name for name, _ in labels),
        places=tuple(place for _, place in labels),
        units=tuple(METRICS[name].unit for name, _ in labels),
        values=values_MN,
        errors=errors_MN,
        baselines=np.array([baselines[name] for name, _ in labels]),
        phase_starts=np.array([-1 if phase is None else steps[phase.first] for phase in phases], dtype=int),
        phase_ends=np.array([-1 if phase is None else steps[phase.last] for phase in phases], dtype=int),
        phase_sizes=np.array([np.nan if phase is None else phase.change for phase in phases]),
        num_tried=sum(int(np.isfinite(curve).sum()) >= LEAST_VALUES for curve in curves),
        curve_steps=np.array([step for step, _ in curve], dtype=int),
        curve_losses=np.array([loss for _, loss in curve], dtype=float),
        receipts=(
            Receipt("the last snapshot, loaded and analysed alone", difference(values_MN[:, -1], again_M), 0.0),
            *worst.values(),
        ),
    )


def measure(subject: Subject, metrics: Sequence[Metric]) -> dict[tuple[str, str], float]:
    """By metric and place."""
    return {(metric.name, place): value for metric in metrics for place, value in metric.measure(subject).items()}


def searched(metric: Metric, values_N: np.ndarray) -> np.ndarray:
    """The values that are searched for a phase change: without those of matrices that are still zero."""
    return np.where(values_N == 0, np.nan, values_N) if metric.zero_is_missing else values_N


def worse(receipt: Receipt, other: Receipt | None) -> Receipt:
    """The one of the same law with the larger error; an error that is no number is larger than any."""
    return receipt if other is None or not receipt.error <= other.error else other


def untrained(subject: Subject, metrics: Sequence[Metric]) -> Iterator[Receipt]:
    """What must hold before the first update, for those of the metrics that were chosen."""
    names = {metric.name for metric in metrics}
    scores = [METRICS[name] for name in names & {"previous", "current", "first", "duplicate", "induction"}]
    errors = [
        abs(value - metric.baseline(subject))
        for metric in scores
        for value in metric.measure(subject).values()
        if np.isfinite(value)
    ]
    if errors:
        yield Receipt("at step 0 heads look at all tokens alike", max(errors), NEAR_UNIFORM)
    gap = float(subject.heads.repeat_gap) if "repeat-gap" in names else np.nan
    if np.isfinite(gap):
        yield Receipt("at step 0 there is no repeat gap", abs(gap), NEAR_NOTHING)
        # Of different tokens: an untrained model with a tied output expects each token to come again at once, and so
        # is better than chance at text in which that happens.
        model, losses = subject.model, subject.heads.losses
        error = abs(float(losses[: len(losses) // 2].mean()) - math.log(model.vocab_size))
        # Logits of weights N(0, 0.02^2) on a stream of norm sqrt(E) have a variance of 0.02^2 E, half of which is loss.
        tolerance = NEAR_NOTHING + 0.02**2 * model.embedding_size
        yield Receipt("at step 0 different tokens have the loss of chance", error, tolerance)


def difference(values_M: np.ndarray, expected_M: np.ndarray) -> float:
    """The largest; what is missing in both does not differ."""
    same = (values_M == expected_M) | (np.isnan(values_M) & np.isnan(expected_M))
    return float(np.abs(np.where(same, 0.0, values_M - expected_M)).max(initial=0.0))
