"""ACDC: cut edges one after another, and leave those cut that hardly change the metric.

Shapes: N edge, R run.
"""

import torch
from torch import Tensor

from lumiere.interpret.edge_ablation import EdgeRuns

MOST_AT_ONCE = 64
"""Cuts that are tried in one batch."""


def acdc(runs: EdgeRuns, threshold: float, is_reversed: bool = True) -> Tensor:
    """Return which edges stay, (N,), by ACDC (Conmy et al. 2023, arXiv:2304.14997).

    From the logits back, each edge into each reader is cut; it stays cut if the mean metric changes by less than
    `threshold`, compared with all earlier cuts in place. The edges into one reader are tried in the order of the
    writers, or the reverse order, as in the paper's code: the result depends on it. The paper's metric is a
    Kullback-Leibler divergence, which rises; this one may rise or fall, so the change counts without its sign.

    Most cuts stay, so a batch tries a chain of cuts, each on top of the one before, up to the first that is undone.

    Args:
        threshold: In units of the metric.
    """
    edges = runs.graph.edges
    order = sorted(range(len(edges)), key=lambda edge: (-edges[edge][0], edges[edge][1] * (-1 if is_reversed else 1)))
    is_cut_N = torch.zeros(len(edges))
    metric = float(runs.cut(is_cut_N[None]).mean())
    first, at_once = 0, 1
    while first < len(order):
        chain = order[first : first + at_once]
        tried_RN = is_cut_N.repeat(len(chain), 1)
        for row, edge in enumerate(chain):
            tried_RN[row:, edge] = 1
        at_once = min(2 * at_once, MOST_AT_ONCE)
        for edge, changed in zip(chain, runs.cut(tried_RN).mean(1).tolist(), strict=True):
            first += 1
            if not abs(changed - metric) < threshold:
                at_once = max(1, at_once // 4)
                break
            is_cut_N[edge], metric = 1, changed
    return is_cut_N == 0
