"""Find circuits that are known by each method: `python benchmarks/circuits.py`.

For each task of `lumiere.lab.circuits`: precision and recall of the edges whose score is at least 1 % of the difference
between clean and corrupt prompts (fixed beforehand), against the edges that the construction writes, and seconds.
Means over seeds, which draw the idle weights, the places of the heads, the basis of the stream and the prompts.

- exact: cut each edge alone.
- pairs: cut each two edges together too; an edge is found if the two do at least 1 % more than the sum of each alone.
- EAP, EAP-IG: the estimates of `lumiere.interpret.edge_attribution`.
- ACDC: both orders of the writers.

A sharp pattern hides from gradients: `--sharpness` sets by how much the score of what a head looks for exceeds others.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lumiere.interpret.acdc import acdc
from lumiere.interpret.circuit import THRESHOLD
from lumiere.interpret.edge_ablation import EdgeRuns
from lumiere.interpret.edge_attribution import edge_attribution, integrated_attribution
from lumiere.interpret.metrics import logit_difference
from lumiere.interpret.prompts import PromptPairs
from lumiere.lab.circuits import SHARPNESS, TASKS, known_circuit

Method = Callable[[EdgeRuns, float], Tensor]
"""Takes the runs and the difference between the prompts; returns which edges are found, (N,)."""


def large(shares: Tensor) -> Tensor:
    return shares.abs() >= THRESHOLD


@torch.no_grad()
def effects_of(runs: EdgeRuns, gap: float) -> Tensor:
    return (runs.clean_B - runs.each_edge()).mean(1) / gap


@torch.no_grad()
def by_pairs(runs: EdgeRuns, gap: float) -> Tensor:
    alone = effects_of(runs, gap)
    first, second = torch.triu_indices(len(alone), len(alone), 1)
    cuts = torch.zeros(len(first), len(alone))
    rows = torch.arange(len(first))
    cuts[rows, first], cuts[rows, second] = 1, 1
    together = (runs.clean_B - runs.cut(cuts)).mean(1) / gap
    surplus = together - alone[first] - alone[second] >= THRESHOLD
    found = large(alone)
    found[first[surplus]], found[second[surplus]] = True, True
    return found


def by_acdc(is_reversed: bool) -> Method:
    return torch.no_grad()(lambda runs, gap: acdc(runs, THRESHOLD * abs(gap), is_reversed))


METHODS: dict[str, Method] = {
    "exact": lambda runs, gap: large(effects_of(runs, gap)),
    "exact, and pairs": by_pairs,
    "EAP": lambda runs, gap: large(edge_attribution(runs).mean(1) / gap),
    "EAP-IG": lambda runs, gap: large(integrated_attribution(runs).mean(1) / gap),
    "ACDC, last to first": by_acdc(True),
    "ACDC, first to last": by_acdc(False),
}


def measure(task: str, method: str, pairs: int, sharpness: float, seed: int) -> tuple[float, float, float, int]:
    """Return precision, recall, seconds and the number of edges."""
    known = known_circuit(task, pairs, sharpness, seed)
    contrast = PromptPairs(
        known.clean, known.corrupt, known.positions, known.targets, known.versus, np.arange(len(known.clean))
    )
    start = time.perf_counter()
    with torch.no_grad():
        runs = EdgeRuns(known.model, contrast, logit_difference)
    is_found = METHODS[method](runs, float((runs.clean_B - runs.corrupt_B).mean()))
    seconds = time.perf_counter() - start
    found = {edge for edge, kept in zip(runs.graph.names, is_found.tolist(), strict=True) if kept}
    right = len(found & set(known.edges))
    return right / len(found) if found else 0.0, right / len(known.edges), seconds, runs.num_edges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sharpness", type=float, default=SHARPNESS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("task", "edges", "method", "precision", "recall", "seconds")
    for task in arguments.tasks:
        for method in arguments.methods:
            runs = [
                measure(task, method, arguments.pairs, arguments.sharpness, seed) for seed in range(arguments.seeds)
            ]
            precision, recall = (statistics.mean(run[column] for run in runs) for column in (0, 1))
            seconds = statistics.median(run[2] for run in runs)
            table.add_row(task, str(runs[0][3]), method, f"{precision:.2f}", f"{recall:.2f}", f"{seconds:.2f}")
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
