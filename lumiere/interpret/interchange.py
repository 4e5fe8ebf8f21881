"""Interchange interventions: does a subspace of the residual stream carry a variable of a high-level model?

Shapes: N pair, T position, E embedding_size, K dimension of the subspace, C answer, S seed, M method.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.interpret.lenses import read_streams
from lumiere.interpret.result import Receipt, Result, rounding, table
from lumiere.models.transformer import Transformer

STEPS, LEARNING_RATE, SEEDS = 100, 1e-2, 5
PLAIN, FULL, DAS, ARBITRARY = "no intervention", "whole stream", "DAS", "DAS, arbitrary labels"
RANDOM, MEANS, UNTRAINED = "random subspace", "difference of means", "DAS, untrained weights"


@dataclass(frozen=True)
class InterchangePairs:
    """Base and source prompts, with the high-level model as data: the answer once the source's value is put in.

    Attributes:
        base, source: (N, T) ids.
        labels: (N,) the token that should be predicted after the base prompt with the source's value.
    """

    base: Tensor
    source: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Interchange(Result):
    """Interchange intervention accuracy (IIA) of subspaces, on pairs that they were not fitted to.

    Attributes:
        layer: after whose block the stream is changed.
        base_position, source_position: where it is changed, and where its new value is read.
        rank: dimensions of the subspace.
        answers: (C,) tokens among which the prediction is chosen.
        num_fitted, num_tested: pairs of each seed.
        steps: of training a subspace.
        methods: (M,).
        accuracies: (M, S) how often the most probable answer is the label, by method and seed.
        log_odds: (M, S) mean of ln p(label) minus ln of the other answers' probability.
        exact_log_odds: (2, S) those without intervention and with the whole stream, which nothing is fitted for.
    """

    layer: int
    base_position: int
    source_position: int
    rank: int
    answers: tuple[int, ...]
    num_fitted: int
    num_tested: int
    steps: int
    methods: tuple[str, ...]
    accuracies: np.ndarray
    log_odds: np.ndarray
    exact_log_odds: np.ndarray
    DISCRETE = frozenset({"accuracies", "log_odds"})

    def rows(self) -> Iterator[Mapping[str, Any]]:
        seeds = range(self.accuracies.shape[1])
        return table({"method": self.methods, "seed": seeds}, accuracy=self.accuracies, log_odds=self.log_odds)


class Site:
    """A model's streams after a block for all pairs, and what follows from changing one position.

    Args:
        layer: the block.
    """

    def __init__(
        self, model: Transformer, pairs: InterchangePairs, layer: int, positions: tuple[int, int], answers: Tensor
    ) -> None:
        self.model, self.layer, self.place, self.answers = model, layer, positions[0], answers
        self.base_NTE = read_streams(model, pairs.base)[layer + 1]
        self.source_NE = read_streams(model, pairs.source)[layer + 1][:, positions[1]]

    def answer_logits(self, rows: Tensor, subspace_EK: Tensor | None) -> Tensor:
        """Return the answers' logits after the base prompt, (N, C): `h' = h_b + (h_s - h_b) B B^T`; None: all of it."""
        resid_NTE = self.base_NTE[rows].clone()
        change_NE = self.source_NE[rows] - resid_NTE[:, self.place]
        if subspace_EK is not None:
            change_NE = (change_NE @ subspace_EK) @ subspace_EK.T
        resid_NTE[:, self.place] += change_NE
        final_NTE = self.model.continue_from(resid_NTE, self.layer + 1)
        return self.model.unembed(final_NTE[:, -1])[:, self.answers]

    def fit(self, rows: Tensor, classes_N: Tensor, rank: int, steps: int, seed: int) -> Tensor:
        """Return the subspace, (E, K), with the least cross-entropy to the classes: DAS (Geiger et al. 2023).

        The columns are the orthonormal factor of a free matrix (QR), trained by Adam on all pairs at once.
        """
        free_EK = random_subspace(self.base_NTE, rank, seed).requires_grad_()
        optimizer = torch.optim.Adam([free_EK], lr=LEARNING_RATE)
        for _ in range(steps):
            with torch.enable_grad():
                logits_NC = self.answer_logits(rows, torch.linalg.qr(free_EK).Q)
                loss = F.cross_entropy(logits_NC, classes_N[rows])
            (free_EK.grad,) = torch.autograd.grad(loss, [free_EK])
            optimizer.step()
        return torch.linalg.qr(free_EK.detach()).Q

    def means_subspace(self, rows: Tensor, classes_N: Tensor, rank: int) -> Tensor:
        """Return the main directions, (E, K), in which the classes' mean source activations differ."""
        found = classes_N[rows]
        means_CE = torch.stack([self.source_NE[rows][found == label].mean(0) for label in found.unique()])
        _, _, directions = torch.linalg.svd(means_CE - means_CE.mean(0), full_matrices=False)
        return directions[:rank].T


def random_subspace(like: Tensor, rank: int, seed: int) -> Tensor:
    """Return orthonormal columns, (E, K), of a random direction."""
    drawn = torch.randn(like.shape[-1], rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.to(like)


def score(logits_NC: Tensor, classes_N: Tensor) -> tuple[float, float]:
    """Return the accuracy and the mean log-odds of the label against all other answers."""
    logits_NC = logits_NC.detach().double()
    of_label_N = logits_NC.gather(1, classes_N[:, None])[:, 0]
    others_NC = logits_NC.scatter(1, classes_N[:, None], float("-inf"))
    return float((logits_NC.argmax(-1) == classes_N).double().mean()), float(
        (of_label_N - others_NC.logsumexp(-1)).mean()
    )


def interchange(
    model: Transformer,
    pairs: InterchangePairs,
    layer: int,
    positions: tuple[int, int] = (-1, -1),
    rank: int = 1,
    steps: int = STEPS,
    seeds: Sequence[int] = range(SEEDS),
    untrained: Callable[[], Transformer] | None = None,
) -> Interchange:
    """Put a subspace of a source prompt's residual stream into a base prompt; count how often the answer follows.

    Geiger et al. 2021, "Causal Abstractions of Neural Networks"; the subspace is found by distributed alignment search
    (Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations"). Each seed fits to another half of the pairs and is tested on the rest. Controls of the same rank
    and number of steps: arbitrary labels (a class drawn for each source prompt), untrained weights, a random subspace,
    and the difference of the classes' means.

    Args:
        pairs: prompts of one length.
        layer: after whose block the stream is changed.
        positions: where the base's stream is changed, and where the source's is read.
        rank: dimensions of the subspace, at most E.
        untrained: returns a model of the same shape.
    """
    answers, classes_N = pairs.labels.unique(return_inverse=True)
    count = len(classes_N)
    sites = {DAS: Site(model, pairs, layer, positions, answers)}
    if untrained is not None:
        sites[UNTRAINED] = Site(untrained(), pairs, layer, positions, answers)
    found: dict[str, list[tuple[float, float]]] = {}
    orthogonality, site = 0.0, sites[DAS]
    nothing = site.base_NTE.new_zeros(site.base_NTE.shape[-1], 0)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator).to(classes_N.device)
        fitted, tested = order[: count // 2], order[count // 2 :]
        _, same = pairs.source.unique(dim=0, return_inverse=True)
        arbitrary_N = torch.randint(len(answers), (int(same.max()) + 1,), generator=generator).to(same.device)[same]

        def test(name: str, subspace_EK: Tensor | None, labels_N: Tensor, at: Site, rows: Tensor = tested) -> None:
            found.setdefault(name, []).append(score(at.answer_logits(rows, subspace_EK), labels_N[rows]))

        with torch.no_grad():
            test(PLAIN, nothing, classes_N, site)
            test(FULL, None, classes_N, site)
            subspace = site.fit(fitted, classes_N, rank, steps, seed)
            identity = torch.eye(rank).to(subspace)
            orthogonality = max(orthogonality, float((subspace.T @ subspace - identity).abs().max()))
            test(DAS, subspace, classes_N, site)
            test(ARBITRARY, site.fit(fitted, arbitrary_N, rank, steps, seed), arbitrary_N, site)
            if UNTRAINED in sites:
                other = sites[UNTRAINED]
                test(UNTRAINED, other.fit(fitted, classes_N, rank, steps, seed), classes_N, other)
            test(RANDOM, random_subspace(site.base_NTE, rank, seed + 1), classes_N, site)
            test(MEANS, site.means_subspace(fitted, classes_N, rank), classes_N, site)
    results = np.array(list(found.values()))  # (M, S, 2)
    with torch.no_grad():
        everything = torch.arange(count, device=classes_N.device)
        whole = site.answer_logits(everything, None)
        turned = site.answer_logits(everything, random_subspace(site.base_NTE, site.base_NTE.shape[-1], 0))
        plain = model.logits(pairs.base)[:, -1][:, answers]
        kept = site.answer_logits(everything, nothing)
    largest = max(1.0, float(whole.abs().max()))
    return Interchange(
        layer=layer,
        base_position=positions[0] % pairs.base.shape[1],
        source_position=positions[1] % pairs.source.shape[1],
        rank=rank,
        answers=tuple(answers.tolist()),
        num_fitted=count // 2,
        num_tested=count - count // 2,
        steps=steps,
        methods=tuple(found),
        accuracies=results[..., 0],
        log_odds=results[..., 1],
        exact_log_odds=results[:2, :, 1],
        receipts=(
            Receipt("no dimension changes nothing", float((kept - plain).abs().max()) / largest, rounding(model)),
            Receipt(
                "all dimensions are the whole stream",
                float((turned - whole).abs().max()) / largest,
                10 * rounding(model),
            ),
            Receipt("the subspaces are orthonormal", orthogonality, 1e-6 if rounding(model) > 1e-6 else 1e-10),
        ),
    )
