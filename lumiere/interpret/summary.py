"""What is in a model, and what looks wrong with it.

Shapes: M matrix, N norm, V vocab_size, C context_size, L layer, H head, F d_ff.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumiere.data.batches import Batch
from lumiere.interpret.activity import Activity, measure_activity
from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, Result, rounding
from lumiere.interpret.weights import MatrixFacts, count_parts, matrix_facts, same_rows
from lumiere.models.transformer import Transformer

SILENT = 1e-3
"""A part that writes less than this share of the stream's norm does nothing."""
DEAD = 1e-6
"""A neuron whose activation never exceeds this, in absolute value, is dead."""
SMALL_GAIN = 1e-2
"""A gain below this, in absolute value, shuts its direction out."""
LOW_RANK = 0.1
"""A matrix whose effective rank is below this share of the largest possible has collapsed."""
SAME = 0.999
"""Rows with this cosine or more have the same vector."""
PLACES_KEPT = 1000
"""Places of a check that are named; all are counted."""


@dataclass(frozen=True)
class Check:
    """Something that may be wrong.

    Attributes:
        what: what was looked for.
        threshold: from where on it counts.
        count: how often it was found; 0 is well.
        places: where, the first `PLACES_KEPT`.
    """

    what: str
    threshold: str
    count: int
    places: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSummary(Result):
    """What is in a model. What needs a text is None without one.

    Attributes:
        parameters: by part; the token embedding is the output head too, and counts once.
        matrices, shapes, norms, rms, spectral_norms, stable_ranks, effective_ranks: as `MatrixFacts`.
        gain_names: (N,) the norms with a gain.
        gains: (N, E).
        token_norms: (V,) norms of the rows of the token embedding.
        token_mean_share: of the mean square of a row, how much is the mean row's.
        position_norms: (C,) norms of the rows of the position embedding; None where positions are rotary.
        position_cosine: mean cosine of neighbouring rows of it.
        num_windows, num_tokens, writes, head_writes, largest_activations: as `Activity`.
        checks: all that was looked for, with its threshold; those that found something are warnings.
    """

    parameters: Mapping[str, int]
    matrices: tuple[str, ...]
    shapes: np.ndarray
    norms: np.ndarray
    rms: np.ndarray
    spectral_norms: np.ndarray
    stable_ranks: np.ndarray
    effective_ranks: np.ndarray
    gain_names: tuple[str, ...]
    gains: np.ndarray
    token_norms: np.ndarray
    token_mean_share: float
    position_norms: np.ndarray | None
    position_cosine: float | None
    num_windows: int
    num_tokens: int
    writes: np.ndarray | None
    head_writes: np.ndarray | None
    largest_activations: np.ndarray | None
    checks: tuple[Check, ...]

    @property
    def warnings(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.count)

    def rows(self) -> Iterator[Mapping[str, Any]]:
        columns = ("norms", "rms", "spectral_norms", "stable_ranks", "effective_ranks")
        for number, name in enumerate(self.matrices):
            shape = {"rows": int(self.shapes[number, 0]), "columns": int(self.shapes[number, 1])}
            sizes = {
                column.removesuffix("s") if column != "rms" else column: getattr(self, column) for column in columns
            }
            yield {"matrix": name, **shape, **{column: float(values[number]) for column, values in sizes.items()}}


def summarize(
    model: Transformer, batches: Sequence[Batch] = (), token_counts: np.ndarray | None = None
) -> ModelSummary:
    """Parameters, norms, ranks, gains and embeddings, what the parts do on `batches`, and checks.

    Args:
        model: in evaluation mode.
        batches: a text, such as validation windows; none: the weights alone.
        token_counts: (V,) how often the model met each token in training, if that is known.
    """
    parameters, facts = count_parts(model), matrix_facts(model)
    gains = {name: value for name, value in model.state_dict().items() if value.ndim == 1}
    gains_NE = np.stack([gain.cpu().double().numpy() for gain in gains.values()])
    table_VE = model.token_embedding.weight.detach().cpu().double().numpy()
    token_norms = np.linalg.norm(table_VE, axis=1)
    position_norms = position_cosine = None
    if model.position_embedding is not None:
        position_CE = model.position_embedding.weight.detach().cpu().double().numpy()
        position_norms = np.linalg.norm(position_CE, axis=1)
        directions_CE = position_CE / np.maximum(position_norms, np.finfo(float).tiny)[:, None]
        position_cosine = (
            float((directions_CE[1:] * directions_CE[:-1]).sum(1).mean()) if len(directions_CE) > 1 else 1.0
        )
    activity = measure_activity(model, batches) if batches else None
    gain_names = tuple(name.removesuffix(".weight") for name in gains)
    checks = [*weight_checks(model, facts, gain_names, gains_NE, token_norms), *token_checks(token_counts)]
    return ModelSummary(
        parameters=parameters,
        **vars(facts),
        gain_names=gain_names,
        gains=gains_NE,
        token_norms=token_norms,
        token_mean_share=float(np.square(table_VE.mean(0)).sum() / np.square(token_norms).mean()),
        position_norms=position_norms,
        position_cosine=position_cosine,
        num_windows=0 if activity is None else activity.num_windows,
        num_tokens=0 if activity is None else activity.num_tokens,
        writes=None if activity is None else activity.writes,
        head_writes=None if activity is None else activity.head_writes,
        largest_activations=None if activity is None else activity.largest_activations,
        checks=tuple(checks if activity is None else [*checks, *activity_checks(activity)]),
        receipts=tuple(receipts(model, parameters, facts, activity)),
    )


def receipts(
    model: Transformer, parameters: Mapping[str, int], facts: MatrixFacts, activity: Activity | None
) -> Iterator[Receipt]:
    yield Receipt("the parts hold all parameters", abs(sum(parameters.values()) - model.num_parameters), 0.0)
    by_rank = facts.spectral_norms * np.sqrt(facts.stable_ranks)
    error = np.abs(by_rank - facts.norms) / np.maximum(facts.norms, np.finfo(float).tiny)
    yield Receipt(
        "spectral norm x root of the stable rank is the Frobenius norm", float(error.max()), FLOAT64_TOLERANCE
    )
    largest = np.maximum(facts.stable_ranks, facts.effective_ranks) / facts.shapes.min(axis=1)
    yield Receipt("no rank exceeds the shape", float(np.maximum(largest.max() - 1, 0.0)), FLOAT64_TOLERANCE)
    if activity is not None:
        yield Receipt("the output head is the token embedding (tied)", activity.tied_error, rounding(model))


def weight_checks(
    model: Transformer, facts: MatrixFacts, gain_names: Sequence[str], gains_NE: np.ndarray, token_norms: np.ndarray
) -> Iterator[Check]:
    state = model.state_dict()
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    yield check("weights that are no finite numbers", "any", broken)
    collapsed = facts.effective_ranks < LOW_RANK * facts.shapes.min(axis=1)
    yield check(
        "matrices of low rank",
        f"effective rank below {LOW_RANK:.0%} of the smaller side",
        [name for name, is_collapsed in zip(facts.matrices, collapsed, strict=True) if is_collapsed],
    )
    small = [f"{gain_names[row]}.{column}" for row, column in np.argwhere(np.abs(gains_NE) < SMALL_GAIN)]
    yield check("gains that shut a direction out", f"absolute value below {SMALL_GAIN:g}", small)
    yield check("tokens without a vector", "norm 0", [f"{token}" for token in np.flatnonzero(token_norms == 0)])
    pairs = same_rows(model.token_embedding.weight, SAME)
    named = [f"{row}, {earlier}" for row, earlier in pairs]
    yield check("tokens with the vector of an earlier token", f"cosine {SAME:g} or more", named)
    if model.position_embedding is not None:
        pairs = same_rows(model.position_embedding.weight, SAME)
        named = [f"{row}, {earlier}" for row, earlier in pairs]
        yield check("positions with the vector of an earlier one", f"cosine {SAME:g} or more", named)


def token_checks(token_counts: np.ndarray | None) -> Iterator[Check]:
    if token_counts is not None:
        never = [f"{token}" for token in np.flatnonzero(token_counts == 0)]
        yield check("tokens that were never met in training", "not once in the training split", never)


def activity_checks(activity: Activity) -> Iterator[Check]:
    silent = f"writes below {SILENT:.1%} of the stream"
    parts = ("attention", "feed-forward")
    named = [f"L{layer} {parts[part]}" for layer, part in np.argwhere(activity.writes < SILENT)]
    yield check("parts of layers that do nothing", silent, named)
    heads = [f"L{layer}H{head}" for layer, head in np.argwhere(activity.head_writes < SILENT)]
    yield check("heads that do nothing", silent, heads)
    dead = [f"L{layer}N{neuron}" for layer, neuron in np.argwhere(activity.largest_activations <= DEAD)]
    over = f"never above {DEAD:g} in {activity.num_tokens:,} tokens"
    yield check("dead neurons", over, dead)


def check(what: str, threshold: str, places: Sequence[str]) -> Check:
    return Check(what, threshold, len(places), tuple(places[:PLACES_KEPT]))
