"""ACDC on known circuits, against the same method one edge at a time."""

import numpy as np
import pytest
import torch

from lumiere.interpret.acdc import acdc
from lumiere.interpret.edge_ablation import EdgeRuns
from lumiere.interpret.metrics import logit_difference
from lumiere.interpret.prompts import PromptPairs
from lumiere.lab.circuits import known_circuit


def runs_of(name: str) -> EdgeRuns:
    known = known_circuit(name, pairs=4)
    pairs = PromptPairs(known.clean, known.corrupt, known.positions, known.targets, known.versus, np.arange(4))
    with torch.no_grad():
        return EdgeRuns(known.model, pairs, logit_difference)


@torch.no_grad()
@pytest.mark.parametrize("is_reversed", [True, False])
@pytest.mark.parametrize("name", ["sort", "greater-than"])
def test_a_batch_of_cuts_is_one_after_another(name: str, is_reversed: bool) -> None:
    runs = runs_of(name)
    threshold = 0.05 * float((runs.clean_B - runs.corrupt_B).mean())
    readers = reversed(range(len(runs.graph.readers)))
    is_cut, metric = torch.zeros(runs.num_edges), float(runs.clean_B.mean())
    for place in readers:
        edges = [edge for edge, (reader, _) in enumerate(runs.graph.edges) if reader == place]
        for edge in reversed(edges) if is_reversed else edges:
            is_cut[edge] = 1
            changed = float(runs.cut(is_cut[None]).mean())
            if abs(changed - metric) < threshold:
                metric = changed
            else:
                is_cut[edge] = 0
    kept = acdc(runs, threshold, is_reversed)
    assert torch.equal(kept, is_cut == 0)
    assert {runs.graph.names[edge] for edge in np.flatnonzero(kept.numpy())} == set(known_circuit(name).edges)
