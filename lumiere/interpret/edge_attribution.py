"""Estimate the effect of cutting each edge from gradients, instead of cutting it.

Shapes: B prompt, T position, E embedding_size, W writer, N edge, R run; D reader.
"""

import torch
from torch import Tensor

from lumiere.interpret.edge_ablation import EdgeRuns

STEPS = 16
"""Of the path integral."""


def edge_attribution(runs: EdgeRuns) -> Tensor:
    """Return edge attribution patching (Syed et al. 2023, arXiv:2310.10348) of each edge and prompt, (N, B), float64.

    `sum over positions of (clean write - replacement) * gradient of the metric at the reader's input`, at the clean
    run: to first order what the metric loses if the edge is cut.
    """
    return _attribution(runs, torch.ones(1))


def integrated_attribution(runs: EdgeRuns, steps: int = STEPS) -> Tensor:
    """Return EAP with integrated gradients (Hanna et al. 2024, arXiv:2403.17806) of each edge and prompt, (N, B).

    The gradient is the mean over runs whose embedding is `corrupt + alpha (clean - corrupt)`, at the midpoints of
    `steps` equal steps ("EAP-IG inputs"; the paper's code takes the left end of each step). Where cut edges carry the
    corrupt prompt's writes, the scores of the embedding's edges add up to the metric's difference between the prompts,
    up to the error of the quadrature.
    """
    return _attribution(runs, (torch.arange(steps) + 0.5) / steps)


def _attribution(runs: EdgeRuns, alphas_R: Tensor) -> Tensor:
    clean_BTE, corrupt_BTE = runs.clean_WBTE[0], runs.corrupt_WBTE[0]
    change_WBTE = runs.replacement_WBTE - runs.clean_WBTE
    places, writers = torch.tensor(runs.graph.edges).T
    total_NB = torch.zeros(runs.num_edges, len(runs.pairs), dtype=torch.float64)
    for alpha in alphas_R.to(clean_BTE):
        # A table for each prompt, so that each has its own gradient. Its entries are multiples of `change`.
        cut_1BDW = runs.graph.mask(clean_BTE.new_zeros(1, len(runs.pairs), runs.num_edges)).requires_grad_()
        with torch.enable_grad():
            metric = runs.forward(cut_1BDW, corrupt_BTE + alpha * (clean_BTE - corrupt_BTE), change_WBTE)
            (gradient_1BDW,) = torch.autograd.grad(metric.sum(), cut_1BDW)
        total_NB -= gradient_1BDW[0, :, places, writers].T.double().cpu()
    return total_NB / len(alphas_R)
