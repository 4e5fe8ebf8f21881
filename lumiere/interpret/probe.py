"""Linear probes: can a property of a token be read off the residual stream, by stage?

Shapes: n tokens, E embedding_size, S stage, C class, P split (training, tuning, test), R control seed, K size of a
sparse probe; U unit of the bootstrap (test document), M resample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import run_with_cache
from lumiere.errors import LumiereError
from lumiere.interpret import logistic
from lumiere.interpret.bootstrap import limits, resampled_counts
from lumiere.interpret.logistic import Fit
from lumiere.interpret.result import Receipt, Result, rounding
from lumiere.models.transformer import Transformer

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CONTROL_SEEDS = 5
SHARES = (0.6, 0.2)
"""Of the documents, for training and tuning; the rest is for the test."""
TRAIN, TUNE, TEST = range(3)
BATCH_TOKENS = 4096
LARGEST_SPARSE = 256


@dataclass(frozen=True)
class Labelled:
    """Texts with a class for some of their tokens.

    Attributes:
        sequences: ids of each text, as the model reads them.
        labels: the class of each token, from 0; -1 for those left out.
        types: of each token, what decides the class of the control task: the token itself, or the one before or after.
        documents: which document each text is from: documents are never split.
        classes: their names.
    """

    sequences: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]]
    types: Sequence[Sequence[int]]
    documents: Sequence[int]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """Labelled tokens with their residual stream: x (S, n, E), and y, kind, token, document and split, (n,)."""

    x: Tensor
    y: np.ndarray
    kind: np.ndarray
    token: np.ndarray
    document: np.ndarray
    split: np.ndarray


def gather(model: Transformer, data: Labelled, stages: Sequence[int], seed: int) -> tuple[Examples, Tensor]:
    """Read the stream at all labelled tokens; return it with the mean norms after each block, (L,).

    Args:
        stages: 0 is the embedding, s the stream after block s - 1.
    """
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.num_layers))]
    unique = {tuple(row): number for number, row in reversed(list(enumerate(data.sequences)))}
    order = sorted(unique.values(), key=lambda number: len(data.sequences[number]))
    parts: list[Tensor] = []
    rows: list[tuple[int, int, int, int]] = []
    total, count, begin = torch.zeros(len(names), dtype=torch.float64), 0, 0
    device = model.unembedding.device
    while begin < len(order):
        longest = len(data.sequences[order[begin]])
        end = begin + max(1, BATCH_TOKENS // max(longest, 1))
        chosen = order[begin:end]
        width = max(len(data.sequences[number]) for number in chosen)
        padded = [[*data.sequences[number], *[0] * (width - len(data.sequences[number]))] for number in chosen]
        _, cache = run_with_cache(model, torch.tensor(padded, device=device), names)
        stream_SBTE = torch.stack([cache[name] for name in names])
        places = []
        for row, number in enumerate(chosen):
            norms_ST = stream_SBTE[:, row, 1 : len(data.sequences[number])].norm(dim=-1)
            total += norms_ST.double().sum(1).cpu()
            count += norms_ST.shape[1]
            for position, label in enumerate(data.labels[number]):
                if label >= 0:
                    places.append((row, position))
                    kind, token = data.types[number][position], data.sequences[number][position]
                    rows.append((label, kind, token, data.documents[number]))
        if places:
            at = torch.tensor(places, device=device).T
            parts.append(stream_SBTE[list(stages)][:, at[0], at[1]].cpu())
        begin = end
    if not rows:
        raise LumiereError("no token has a label", "give other text, or another property")
    y, kind, token, document = np.array(rows).T
    return Examples(torch.cat(parts, dim=1), y, kind, token, document, split_documents(document, seed)), (
        total / count
    )[1:]


def split_documents(document_n: np.ndarray, seed: int) -> np.ndarray:
    """Return the part of each token, by document: training, tuning or test."""
    names, number_n = np.unique(document_n, return_inverse=True)
    if len(names) < 5:
        raise LumiereError(
            f"a probe needs 5 documents or more to be split by document, and there are {len(names)}",
            "give more text: documents of a file are separated by blank lines",
        )
    order = np.random.default_rng(seed).permutation(len(names))
    first, second = (max(1, round(len(names) * share)) for share in SHARES)
    part = np.full(len(names), TEST)
    part[order[:first]], part[order[first : first + second]] = TRAIN, TUNE
    return part[number_n]


@dataclass(frozen=True, kw_only=True)
class Probe(Result):
    """How well a property is read off each stage of the residual stream.

    Attributes:
        subject: the property, in words.
        classes: its values.
        counts: (P, C) tokens of each class for training, tuning and test.
        num_documents: (P,).
        stages: names of the stages: `embedding`, or L0 for the stream after block 0.
        penalties: (S,) chosen on the tuning documents, as `chosen`, the stage.
        tuning_losses: (S,) cross-entropy on the tuning documents, in nats.
        accuracy, balanced_accuracy, auc: (S,) on the test documents; the AUC is NaN for more than two classes.
        accuracy_low, accuracy_high, balanced_low, balanced_high, auc_low, auc_high: (S,) intervals by resampling
            documents; NaN for fewer than 8.
        gain, gain_low, gain_high: (S,) accuracy less that of the embedding, resampled together.
        control: (S, R) test accuracy on control tasks, tokens of types that occur in training alone.
        selectivity: (S,) accuracy on the same tokens less the mean of `control`.
        majority: test accuracy of the most frequent class.
        by_token: test accuracy of the most frequent class of each token in training: what needs no context.
        chosen: the place in `stages` of the stage with the lowest tuning loss.
        sizes: (K,) numbers of coordinates of sparse probes at that stage.
        sparse, random_sparse: (K,) test accuracy of the coordinates whose class means differ most, and of random ones.
        vector: (E,) the direction of a probe for two classes at that stage, for features that are not standardized; the
            first class's weights if there are more.
        vector_norm: its length.
        stream_norms: (L,) mean norm of the stream after each block.
        test_counts: (2, U) tokens of each test document, all and those of types that occur in training.
        test_sums: (2, S, U) the sums over them whose means are the accuracy and the selectivity.
        gradients, decrements: (S,) of the fits.
    """

    DISCRETE: ClassVar[frozenset[str]] = frozenset(
        {
            "penalties", "accuracy", "balanced_accuracy", "auc", "accuracy_low", "accuracy_high", "balanced_low",
            "balanced_high", "auc_low", "auc_high", "gain", "gain_low", "gain_high", "control", "selectivity", "sparse",
            "random_sparse", "vector", "test_sums", "gradients", "decrements",
        }
    )  # fmt: skip
    subject: str
    classes: tuple[str, ...]
    counts: np.ndarray
    num_documents: np.ndarray
    stages: tuple[str, ...]
    penalties: np.ndarray
    tuning_losses: np.ndarray
    accuracy: np.ndarray
    accuracy_low: np.ndarray
    accuracy_high: np.ndarray
    balanced_accuracy: np.ndarray
    balanced_low: np.ndarray
    balanced_high: np.ndarray
    auc: np.ndarray
    auc_low: np.ndarray
    auc_high: np.ndarray
    gain: np.ndarray
    gain_low: np.ndarray
    gain_high: np.ndarray
    control: np.ndarray
    selectivity: np.ndarray
    majority: float
    by_token: float
    chosen: int
    sizes: np.ndarray
    sparse: np.ndarray
    random_sparse: np.ndarray
    vector: np.ndarray
    vector_norm: float
    stream_norms: np.ndarray
    test_counts: np.ndarray
    test_sums: np.ndarray
    gradients: np.ndarray
    decrements: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        columns = {name: getattr(self, name) for name in (
            "accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "auc", "gain", "gain_low", "gain_high",
            "selectivity", "tuning_losses", "penalties",
        )}  # fmt: skip
        for row, stage in enumerate(self.stages):
            yield {"stage": stage} | {name: float(values[row]) for name, values in columns.items()}


def auc_of(score_n: np.ndarray, is_positive_n: np.ndarray, weights_Mn: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve with each row of weights, (M,); ties count half.

    The probability that a positive example scores higher than a negative one (Hanley & McNeil 1982).
    """
    order = np.argsort(score_n, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score_n[order]) > 0])
    positive, negative = (
        np.add.reduceat((weights_Mn * chosen)[:, order], starts, axis=1) for chosen in (is_positive_n, ~is_positive_n)
    )
    below = negative.cumsum(1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


class Scorer:
    """Scores predictions on the test documents, with intervals over documents."""

    def __init__(self, y_n: np.ndarray, document_n: np.ndarray, num_classes: int, seed: int) -> None:
        self.y_n, self.num_classes = y_n, num_classes
        names, self.number_n = np.unique(document_n, return_inverse=True)
        counts_MU = resampled_counts(np.arange(len(names)), seed)
        one_1n = np.ones((1, len(y_n)))
        self.weights_Mn = one_1n if counts_MU is None else np.concatenate([one_1n, counts_MU[:, self.number_n]])

    def _spread(self, values_M: np.ndarray) -> tuple[float, float, float]:
        """Return a value and its interval."""
        if len(values_M) == 1:
            return float(values_M[0]), np.nan, np.nan
        low, high = limits(values_M[1:][np.isfinite(values_M[1:])], 0.95)
        return float(values_M[0]), float(low), float(high)

    def accuracies(self, is_right_n: np.ndarray) -> np.ndarray:
        """Return the accuracy, then that of each resample, (M,)."""
        return self.weights_Mn @ is_right_n / self.weights_Mn.sum(1)

    def by_document(self, values: np.ndarray) -> np.ndarray:
        """Return the sums over the tokens of each document, (..., U), of (..., n)."""
        return values.astype(float) @ (self.number_n[:, None] == np.arange(self.number_n.max() + 1)).astype(float)

    def scores(self, scores_nC: np.ndarray) -> dict[str, tuple[float, float, float]]:
        is_right_n = scores_nC.argmax(1) == self.y_n
        recalls = []
        with np.errstate(invalid="ignore", divide="ignore"):
            for label in range(self.num_classes):
                of_class = self.weights_Mn * (self.y_n == label)
                recalls.append(of_class @ is_right_n / of_class.sum(1))
        found = {"accuracy": self._spread(self.accuracies(is_right_n))}
        found["balanced"] = self._spread(np.nanmean(recalls, axis=0))
        found["auc"] = (np.nan, np.nan, np.nan)
        if self.num_classes == 2:
            found["auc"] = self._spread(auc_of(scores_nC[:, 1] - scores_nC[:, 0], self.y_n == 1, self.weights_Mn))
        return found

    def gain(self, is_right_n: np.ndarray, base_n: np.ndarray) -> tuple[float, float, float]:
        return self._spread(self.accuracies(is_right_n) - self.accuracies(base_n))


def probe(
    model: Transformer,
    data: Labelled,
    subject: str = "property",
    layers: Sequence[int] | None = None,
    is_balanced: bool = False,
    seed: int = 0,
    control_seeds: int = CONTROL_SEEDS,
) -> Probe:
    """Fit a linear classifier to each stage of the residual stream, and test it on documents that it has not seen.

    Logistic regression on standardized activations. Documents are split into three parts: the classifiers are fitted to
    the first, the penalty and the stage are chosen by the loss on the second, and everything is reported on the third.

    A probe may learn the property instead of reading it. The control task (Hewitt & Liang 2019, "Designing and
    Interpreting Probes with Control Tasks") gives each type a fixed random class, drawn from the distribution of the
    classes; a probe that does as well on it has memorized. Sparse probes (Gurnee et al. 2023) take the coordinates
    whose class means differ most, in units of their standard deviation.

    Args:
        subject: the property, in words.
        layers: blocks after which the stream is read; the embedding is always read. Default: all.
        is_balanced: give all classes the same weight.
        seed: of the split, the control tasks, the random coordinates and the bootstrap.
        control_seeds: how many control tasks.

    Raises:
        LumiereError: too few documents, or a class that is missing in one of the parts.
    """
    layers = range(model.num_layers) if layers is None else layers
    with torch.no_grad():
        found, norms_L = gather(model, data, [0, *(layer + 1 for layer in layers)], seed)
    names, num_classes = ("embedding", *(f"L{layer}" for layer in layers)), len(data.classes)
    counts = np.stack([np.bincount(found.y[found.split == part], minlength=num_classes) for part in range(3)])
    for part, name in enumerate(("training", "tuning", "test")):
        if not counts[part].all():
            raise LumiereError(
                f"no token of the {name} documents is of class {data.classes[int(counts[part].argmin())]!r}",
                "read more text, or choose a property that occurs in more documents",
            )
    train, tune, test = (found.split == part for part in range(3))
    y_n = torch.from_numpy(found.y)
    scorer = Scorer(found.y[test], found.document[test], num_classes, seed)
    is_known = np.isin(found.kind[test], found.kind[train])
    controls = [control_labels(found, train, num_classes, seed + number) for number in range(control_seeds)]
    fits: list[Fit] = []
    others: list[Fit] = []
    penalties, losses, tests, right, control, selective = [], [], [], [], [], []
    for x_nE in found.x:
        tried = [logistic.fit(x_nE[train], y_n[train], num_classes, penalty, is_balanced) for penalty in PENALTIES]
        tuned = [float(torch.nn.functional.cross_entropy(fit.scores(x_nE[tune]), y_n[tune])) for fit in tried]
        best = int(np.argmin(tuned))
        others += tried
        fits.append(tried[best])
        penalties.append(PENALTIES[best])
        losses.append(tuned[best])
        scores_nC = fits[-1].scores(x_nE[test]).numpy()
        tests.append(scorer.scores(scores_nC))
        right.append(scores_nC.argmax(1) == found.y[test])
        of_controls = [logistic.fit(x_nE[train], y[train], num_classes, PENALTIES[best], is_balanced) for y in controls]
        others += of_controls
        of_control_Rn = np.stack([
            fit.scores(x_nE[test]).argmax(1).numpy() == y[test].numpy()
            for fit, y in zip(of_controls, controls, strict=True)
        ])  # fmt: skip
        control.append(of_control_Rn[:, is_known].mean(1))
        selective.append((right[-1] - of_control_Rn.mean(0)) * is_known)
    chosen = int(np.argmin(losses[1:])) + 1 if len(losses) > 1 else 0
    options = (y_n, train, test, num_classes, penalties[chosen], is_balanced)
    sizes, sparse, random_sparse, sparse_fits = sparse_probes(found.x[chosen], *options, seed)
    spreads = {name: np.array([test[name] for test in tests]) for name in tests[0]}
    gains = np.array([scorer.gain(each, right[0]) for each in right])
    vector_E = fits[chosen].direction[0]
    majority = int(counts[TRAIN].argmax())
    error = float(np.abs(scorer.accuracies(right[chosen])[0] - right[chosen].mean()))
    return Probe(
        subject=subject,
        classes=data.classes,
        counts=counts,
        num_documents=np.array([len(np.unique(found.document[found.split == part])) for part in range(3)]),
        stages=names,
        penalties=np.array(penalties),
        tuning_losses=np.array(losses),
        accuracy=spreads["accuracy"][:, 0],
        accuracy_low=spreads["accuracy"][:, 1],
        accuracy_high=spreads["accuracy"][:, 2],
        balanced_accuracy=spreads["balanced"][:, 0],
        balanced_low=spreads["balanced"][:, 1],
        balanced_high=spreads["balanced"][:, 2],
        auc=spreads["auc"][:, 0],
        auc_low=spreads["auc"][:, 1],
        auc_high=spreads["auc"][:, 2],
        gain=gains[:, 0],
        gain_low=gains[:, 1],
        gain_high=gains[:, 2],
        control=np.array(control),
        selectivity=np.array([each[is_known].mean() for each in right]) - np.array(control).mean(1),
        majority=float((found.y[test] == majority).mean()),
        by_token=token_accuracy(found, train, test, majority),
        chosen=chosen,
        sizes=sizes,
        sparse=sparse,
        random_sparse=random_sparse,
        vector=vector_E.numpy(),
        vector_norm=float(vector_E.norm()),
        stream_norms=norms_L.numpy(),
        test_counts=scorer.by_document(np.stack([np.ones_like(is_known), is_known])),
        test_sums=scorer.by_document(np.array([right, selective])),
        gradients=np.array([fit.gradient for fit in fits]),
        decrements=np.array([fit.decrement for fit in fits]),
        receipts=(
            *logistic.receipts([*others, *sparse_fits]),
            Receipt("the accuracy over documents is that over tokens", error, rounding(model)),
        ),
    )


def control_labels(found: Examples, train: np.ndarray, num_classes: int, seed: int) -> Tensor:
    """Return a random class for each type, from the distribution of the classes in training."""
    kinds, number_n = np.unique(found.kind, return_inverse=True)
    shares_C = np.bincount(found.y[train], minlength=num_classes) / train.sum()
    drawn = np.random.default_rng(seed).choice(num_classes, size=len(kinds), p=shares_C)
    return torch.from_numpy(drawn[number_n])


def token_accuracy(found: Examples, train: np.ndarray, test: np.ndarray, majority: int) -> float:
    """Return the test accuracy of the most frequent class of each token in training."""
    tokens, number_n = np.unique(found.token, return_inverse=True)
    counts = np.zeros((len(tokens), found.y.max() + 1))
    np.add.at(counts, (number_n[train], found.y[train]), 1)
    best = np.where(counts.sum(1) > 0, counts.argmax(1), majority)
    return float((best[number_n[test]] == found.y[test]).mean())


def sparse_probes(
    x_nE: Tensor,
    y_n: Tensor,
    train: np.ndarray,
    test: np.ndarray,
    num_classes: int,
    penalty: float,
    is_balanced: bool,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Fit]]:
    """Return sizes, the accuracies with the best and with random coordinates, and all fits."""
    width = x_nE.shape[1]
    x_train = x_nE[train].double()
    scaled = (x_train - x_train.mean(0)) / x_train.std(0, correction=0).clamp(min=logistic.LEAST_SCALE)
    means_CE = torch.stack([scaled[y_n[train] == label].mean(0) for label in range(num_classes)])
    order = (means_CE.amax(0) - means_CE.amin(0)).argsort(descending=True, stable=True)
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(width))
    sizes = [2**power for power in range(LARGEST_SPARSE.bit_length()) if 2**power <= min(width, LARGEST_SPARSE)]
    fits: list[Fit] = []
    accuracies: list[list[float]] = [[], []]
    for size in sizes:
        for kept, coordinates in zip(accuracies, (order[:size], shuffled[:size]), strict=True):
            fits.append(logistic.fit(x_nE[train][:, coordinates], y_n[train], num_classes, penalty, is_balanced))
            predicted = fits[-1].scores(x_nE[test][:, coordinates]).argmax(1)
            kept.append(float((predicted == y_n[test]).double().mean()))
    return np.array(sizes), np.array(accuracies[0]), np.array(accuracies[1]), fits
