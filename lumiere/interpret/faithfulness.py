"""How well a circuit alone does what the model does, and whether it is complete and minimal.

Faithfulness is `F(C) = (M(C) - M(nothing)) / (M(all) - M(nothing))`, with the mean metric M where all edges outside C
are cut. It depends on what cut edges carry, and on whether edges, heads or positions are cut (Miller et al. 2024,
arXiv:2407.08734). It may exceed 1.

Shapes: N edge, R circuit.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lumiere.interpret.edge_ablation import EdgeRuns

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of all edges, at which the curve is computed: those of Mueller et al. 2025 (MIB, arXiv:2504.13151)."""
RANDOM_SUBSETS, MOST_SUBSETS, TRIES = 100, 500, 8
"""Random subsets and all subsets that completeness looks at; subsets for each edge that minimality looks at."""


def faithfulness(runs: EdgeRuns, is_kept_RN: Tensor) -> np.ndarray:
    """Return the faithfulness of each circuit, (R,)."""
    ends = torch.stack([torch.zeros(runs.num_edges), torch.ones(runs.num_edges)])
    empty, full, *metrics = runs.cut(1 - torch.cat([ends, is_kept_RN.float()])).mean(1).tolist()
    return (np.array(metrics) - empty) / (full - empty)


def strongest(scores_N: np.ndarray, count: int) -> Tensor:
    """Return the circuit of the edges with the highest scores, (N,)."""
    is_kept_N = torch.zeros(len(scores_N))
    is_kept_N[torch.from_numpy(np.argsort(-scores_N, kind="stable")[:count].copy())] = 1
    return is_kept_N


def curve(runs: EdgeRuns, scores_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of edges, at `SHARES` of all, and the faithfulness of that many edges with the highest scores."""
    counts = np.unique([max(1, round(share * runs.num_edges)) for share in SHARES])
    return counts, faithfulness(runs, torch.stack([strongest(scores_N, count) for count in counts]))


def area(counts: np.ndarray, heights: np.ndarray, num_edges: int) -> float:
    """Return the integral over the share of edges, by trapezoids, as in MIB."""
    return float(np.trapezoid(heights, counts / num_edges))


def incompleteness(runs: EdgeRuns, is_kept_N: Tensor, seed: int = 0) -> tuple[float, int]:
    """Return `max |F(C without K) - F(M without K)|` over subsets K of a circuit, and the number of subsets.

    0 is complete (Wang et al. 2022, "Interpretability in the Wild", section 4.1): nothing outside the circuit does the
    work of a part of it. K is each edge, each pair, as far as `MOST_SUBSETS` reaches (drawn at random if not), and
    `RANDOM_SUBSETS` random halves.
    """
    generator = np.random.default_rng(seed)
    members = np.flatnonzero(is_kept_N.numpy())
    small = [[edge] for edge in members]
    small += [[first, second] for place, first in enumerate(members) for second in members[place + 1 :]]
    room = MOST_SUBSETS - RANDOM_SUBSETS
    if len(small) > room:
        small = [small[i] for i in np.sort(generator.choice(len(small), room, replace=False))]
    subsets = [*small, *([edge for edge in members if generator.random() < 0.5] for _ in range(RANDOM_SUBSETS))]
    if not len(members):
        return 0.0, 0
    circuit_R, model_R = (
        faithfulness(runs, without(start_N, subsets)) for start_N in (is_kept_N, torch.ones(len(is_kept_N)))
    )
    return float(np.abs(circuit_R - model_R).max()), len(subsets)


def needed(runs: EdgeRuns, is_kept_N: Tensor, seed: int = 0) -> np.ndarray:
    """Return for each edge of a circuit the largest change of F when it is cut, after others or alone, (N,); else NaN.

    Minimal is a circuit in which no edge has a small one (Wang et al. 2022, section 4.2). The edge is cut after no
    other edge of the circuit, and after `TRIES - 1` random subsets of them; fewer for circuits so large that these are
    more than `MOST_SUBSETS`.
    """
    generator = np.random.default_rng(seed)
    members = np.flatnonzero(is_kept_N.numpy())
    changes = np.full(len(is_kept_N), np.nan)
    if not len(members):
        return changes
    tries = min(TRIES, max(1, MOST_SUBSETS // len(members)))
    before: list[list[int]] = []
    for edge in members:
        others = members[members != edge]
        shares = generator.random(tries - 1)
        before += [[], *(others[generator.random(len(others)) < share].tolist() for share in shares)]
    after = [[*cut, members[row // tries]] for row, cut in enumerate(before)]
    before_R, after_R = (faithfulness(runs, without(is_kept_N, cuts)) for cuts in (before, after))
    changes[members] = np.abs(before_R - after_R).reshape(len(members), tries).max(1)
    return changes


def without(is_kept_N: Tensor, subsets: Sequence[Sequence[int]]) -> Tensor:
    """Return the circuit without each of the subsets, (R, N)."""
    kept_RN = is_kept_N.repeat(len(subsets), 1)
    for row, subset in enumerate(subsets):
        kept_RN[row, list(subset)] = 0
    return kept_RN


def random_circuits(num_edges: int, size: int, count: int, seed: int = 0) -> Tensor:
    """Return random circuits of a size, (R, N)."""
    generator = np.random.default_rng(seed)
    return torch.stack([strongest(generator.random(num_edges), size) for _ in range(count)])
