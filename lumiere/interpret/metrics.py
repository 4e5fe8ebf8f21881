"""What `inspect dynamics` can follow along a training: numbers of the other analyses, by name.

Each is taken from the result of the analysis itself, so that it is the same number that the analysis shows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from lumiere.components.kernels import IGNORED, linear_cross_entropy_losses
from lumiere.data.batches import Batch, documents_of
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret.composition import KINDS, Composition, composition_scores
from lumiere.interpret.heads import SCORES, HeadScores
from lumiere.interpret.lens import LogitLens, logit_lens
from lumiere.interpret.result import Receipt, Result
from lumiere.interpret.text_repeats import score_heads
from lumiere.interpret.weights import MatrixFacts, matrix_facts
from lumiere.models.transformer import Transformer

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
    """What all snapshots are given alike.

    Attributes:
        tokens: (N, T) ids for the head scores and the repeat gap, such as `repeated_tokens`.
        windows: for the in-context-learning score and natural repeats, as `score_heads` takes them; None: there are
            none.
        batches: for the validation loss; none: there is no corpus.
        lens_rows: texts whose decision depths are averaged.
        averaged: the tokens that copying is computed over; None: all.
    """

    tokens: torch.Tensor
    windows: tuple[torch.Tensor, np.ndarray] | None = None
    batches: Sequence[Batch] = ()
    lens_rows: Sequence[Sequence[int]] = ()
    averaged: Sequence[int] | None = None


@dataclass
class Subject:
    """One snapshot, and the analyses of it that were asked for, each made once."""

    model: Transformer
    texts: Texts
    found: dict[str, Result] = field(default_factory=dict)

    @property
    def receipts(self) -> list[Receipt]:
        return [receipt for result in self.found.values() for receipt in result.receipts]

    @cached_property
    def heads(self) -> HeadScores:
        result = score_heads(self.model, self.texts.tokens, self.texts.windows, self.texts.averaged)
        self.found["heads"] = result
        return result

    @cached_property
    def loss(self) -> tuple[float, float]:
        return mean_loss(self.model, self.texts.batches)

    @cached_property
    def composition(self) -> Composition:
        result = composition_scores(self.model)
        self.found["composition"] = result
        return result

    @cached_property
    def matrices(self) -> MatrixFacts:
        return matrix_facts(self.model)

    @cached_property
    def lenses(self) -> list[LogitLens]:
        results = [logit_lens(self.model, row) for row in self.texts.lens_rows]
        self.found |= {f"lens {number}": result for number, result in enumerate(results)}
        return results


Values = Mapping[str, float]
"""By place: a head, a pair of heads, a matrix; under the empty name a number of the whole model."""


@dataclass(frozen=True)
class Metric:
    """A number, or one for each head, pair of heads or matrix.

    Attributes:
        name: on the command line.
        meaning: in words.
        unit: of the values: share, nats, stages; or what they are a multiple or a number of.
        noticeable: the least change that can be a phase change.
        measure: takes it from a snapshot.
        baseline: what chance gives; NaN where nothing can be said.
        error: the standard error of a number of the whole model; NaN where it is not known.
        needs_corpus: whether it is a number of the validation split.
        zero_is_missing: whether a value of 0 is that of a matrix of zeros, which has no level to rise from.
        needs_tokens: whether it is a result of `head_scores`, which looks at the tokens of `Texts`.
    """

    name: str
    meaning: str
    unit: str
    noticeable: float
    measure: Callable[[Subject], Values]
    baseline: Callable[[Subject], float] = lambda subject: float("nan")
    error: Callable[[Subject], float] = lambda subject: float("nan")
    needs_corpus: bool = False
    zero_is_missing: bool = False
    needs_tokens: bool = False


def score_metric(number: int, name: str, source: str) -> Metric:
    def measure(subject: Subject) -> Values:
        return by_head(subject.heads.scores[..., number])

    def baseline(subject: Subject) -> float:
        return float(subject.heads.uniform[number])

    meaning = f"share of a head's attention that goes to {source}"
    return Metric(name, meaning, "share", 0.1, measure, baseline, needs_tokens=True)


def text_induction(subject: Subject) -> Values:
    scores = subject.heads.text_scores
    return {} if scores is None else by_head(scores[..., INDUCTION])


def text_chance(subject: Subject) -> float:
    uniform = subject.heads.text_uniform
    return float("nan") if uniform is None else float(uniform[INDUCTION])


def or_nan(value: np.ndarray | None) -> float:
    return float("nan") if value is None else float(value)


def by_head(values_LH: np.ndarray) -> Values:
    return {f"L{layer}H{head}": float(values_LH[layer, head]) for layer, head in np.ndindex(*values_LH.shape)}


def composition_metric(number: int, kind: str) -> Metric:
    def measure(subject: Subject) -> Values:
        result = subject.composition
        labels = (f"L{a}H{b}>L{c}H{d}" for a, b, c, d in result.pairs.tolist())
        return dict(zip(labels, (result.scores[:, number] / result.chance).tolist(), strict=True))

    meaning = f"{kind.upper()}-composition of a head with a later one, as a multiple of chance"
    return Metric(f"{kind}-composition", meaning, "x chance", 0.5, measure, lambda subject: 1.0)


def matrix_metric(name: str, field_name: str, meaning: str, unit: str, noticeable: float) -> Metric:
    def measure(subject: Subject) -> Values:
        facts = subject.matrices
        labels = [label.removesuffix(".weight").removeprefix("blocks.") for label in facts.matrices]
        return dict(zip(labels, getattr(facts, field_name).tolist(), strict=True))

    return Metric(name, meaning, unit, noticeable, measure, zero_is_missing=True)


def mean_loss(model: Transformer, batches: Sequence[Batch]) -> tuple[float, float]:
    """The mean over all targets, summed in float64, and its standard error, clustered by document."""
    weight, sums = model.token_embedding.weight, []
    for batch in batches:
        with torch.inference_mode():
            residual = model.final_residual(batch.tokens.to(weight.device)).flatten(0, 1)
            targets = batch.targets.flatten().to(weight.device)
            losses = linear_cross_entropy_losses(residual, weight, targets).cpu().double().view(batch.targets.shape)
        sums.append(losses.where(batch.targets != IGNORED, 0.0).sum(1).numpy())
    counts = np.concatenate([(batch.targets != IGNORED).sum(1).numpy() for batch in batches])
    (mean,), (error,) = clustered_means(np.concatenate(sums)[None], counts, documents_of(batches))
    return float(mean), float(error)


def mean_depth(subject: Subject) -> Values:
    """The mean, over all positions of the texts, of the stage at which the logit lens has decided."""
    return {"": float(np.concatenate([lens.decision_stages for lens in subject.lenses]).mean())}


INDUCTION = SCORES.index("induction")
SOURCES = ("the token before", "the token itself", "the first token", "earlier places of the same token")
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "validation-loss",
            "mean loss on validation windows",
            "nats",
            0.1,
            lambda subject: {"": subject.loss[0]},
            lambda subject: float(np.log(subject.model.vocab_size)),
            lambda subject: subject.loss[1],
            needs_corpus=True,
        ),
        Metric(
            "in-context-score",
            "loss late in a validation window minus loss early in it",
            "nats",
            0.1,
            lambda subject: {"": float(subject.heads.in_context_score)},
            lambda subject: 0.0,
            lambda subject: float(subject.heads.in_context_error),
            needs_corpus=True,
            needs_tokens=True,
        ),
        Metric(
            "repeat-gap",
            "loss of random tokens minus their loss when repeated",
            "nats",
            0.1,
            lambda subject: {"": float(subject.heads.repeat_gap)},
            lambda subject: 0.0,
            lambda subject: float(subject.heads.repeat_gap_error),
            needs_tokens=True,
        ),
        *(
            score_metric(number, name, source)
            for number, (name, source) in enumerate(
                zip(SCORES, (*SOURCES, "what came after earlier places of the same token"), strict=True)
            )
        ),
        Metric(
            "text-repeat-gap",
            "loss of names at their first occurrence in a validation window minus their loss when repeated",
            "nats",
            0.1,
            lambda subject: {"": or_nan(subject.heads.text_gap)},
            lambda subject: 0.0,
            lambda subject: or_nan(subject.heads.text_gap_error),
            needs_corpus=True,
            needs_tokens=True,
        ),
        Metric(
            "text-induction",
            "share of a head's attention at repeated names of a validation window that goes to what came after",
            "share",
            0.1,
            text_induction,
            text_chance,
            needs_corpus=True,
            needs_tokens=True,
        ),
        Metric(
            "copying",
            "how much more likely a head makes the tokens that it looks at, from its weights",
            "from -1 to 1",
            0.2,
            lambda subject: by_head(subject.heads.copying),
            lambda subject: 0.0,
            needs_tokens=True,
        ),
        *(composition_metric(number, kind) for number, kind in enumerate(KINDS)),
        Metric(
            "lens-depth",
            "mean stage from which on the logit lens has the model's final token on top",
            "stages",
            0.25,
            mean_depth,
            needs_corpus=True,
        ),
        matrix_metric("norm", "norms", "Frobenius norm of a matrix", "", 1.0),
        matrix_metric("spectral-norm", "spectral_norms", "largest singular value of a matrix", "", 0.5),
        matrix_metric("effective-rank", "effective_ranks", "effective rank of a matrix", "ranks", 2.0),
        matrix_metric("stable-rank", "stable_ranks", "stable rank of a matrix", "ranks", 1.0),
    )
}
"""All metrics by name."""
