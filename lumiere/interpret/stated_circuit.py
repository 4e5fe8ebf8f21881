"""Measure a circuit that is given: what its edges do alone, what the others do, and what random ones do.

Shapes: B pair of prompts, N edge, M all pairs, then each resample of them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from lumiere.errors import LumiereError
from lumiere.interpret.bootstrap import ratio_interval, resampled_counts
from lumiere.interpret.circuit import RANDOM_CIRCUITS, receipts_of
from lumiere.interpret.edge_ablation import EdgeRuns
from lumiere.interpret.faithfulness import random_circuits
from lumiere.interpret.metrics import default_metric, find_metric
from lumiere.interpret.prompts import PromptPairs
from lumiere.interpret.result import Receipt, float64
from lumiere.models.transformer import Transformer

NUMBERS = ("faithfulness", "outside_max_effect", "random_same_size")


@dataclass(frozen=True)
class StatedCircuit:
    """Numbers of a circuit.

    Attributes:
        numbers: (M,) by name, for all pairs and then for each resample of their groups; (1,) for fewer than 8 groups;
            NaN where the metric hardly differs between the clean and the corrupt prompts.
        num_groups: Of pairs.
        receipts: Of the runs with edges cut.
    """

    numbers: Mapping[str, np.ndarray]
    num_groups: int
    receipts: tuple[Receipt, ...]


@torch.inference_mode()
def state_circuit(
    model: Transformer,
    pairs: PromptPairs,
    edges: Sequence[str],
    numbers: Collection[str] = NUMBERS,
    ablation: str = "corrupt",
    seed: int = 0,
) -> StatedCircuit:
    """Return numbers of a circuit.

    - `faithfulness`: the share of the metric that remains when all other edges are cut, as `faithfulness.py` defines
      it.
    - `outside_max_effect`: the largest effect of an edge outside, cut alone, without its sign, as a share of the
      difference between clean and corrupt prompts.
    - `random_same_size`: the mean faithfulness of 20 random circuits of as many edges.

    Args:
        edges: Such as `embed->L0H1.v`.
        numbers: Which of `NUMBERS` to compute; `outside_max_effect` cuts every edge.
        ablation: What cut edges carry, one of `ABLATIONS`.
        seed: Of the resamples and the random circuits.

    Raises:
        LumiereError: There is no such edge.
    """
    pairs = pairs.with_predictions(model).to(next(model.parameters()).device)
    metric = find_metric(default_metric(pairs), pairs.read(model.logits(pairs.clean)))
    runs = EdgeRuns(model, pairs, metric, ablation)
    circuit_N = runs.graph.chosen(edges)
    size = int(circuit_N.sum())
    kept = [torch.zeros(1, runs.num_edges), circuit_N[None]]
    if "random_same_size" in numbers:
        kept.append(random_circuits(runs.num_edges, size, RANDOM_CIRCUITS, seed))
    empty_B, kept_B, *random_B = runs.cut(1 - torch.cat(kept)).numpy()
    clean_B, corrupt_B = float64(runs.clean_B), float64(runs.corrupt_B)
    whole_B, gap_B = clean_B - empty_B, clean_B - corrupt_B
    receipts, num_groups = receipts_of(runs, None, seed), len(np.unique(pairs.groups))
    if not all(is_known(below_B, pairs.groups, seed) for below_B in (whole_B, gap_B)):
        return StatedCircuit({name: np.array([np.nan]) for name in numbers}, num_groups, receipts)
    counts_MB = resampled_counts(pairs.groups, seed)
    all_1B = np.ones((1, len(pairs)))
    weights_MB = all_1B if counts_MB is None else np.concatenate([all_1B, counts_MB])
    whole_M, gap_M = weights_MB @ whole_B, weights_MB @ gap_B
    found = {"faithfulness": weights_MB @ (kept_B - empty_B) / whole_M}
    if "random_same_size" in numbers:
        found["random_same_size"] = weights_MB @ (np.mean(random_B, axis=0) - empty_B) / whole_M
    if "outside_max_effect" in numbers:
        effects_NB = clean_B - runs.each_edge().numpy()[circuit_N.numpy() == 0]
        sums = (np.abs(weights_MB @ effect_B) for effect_B in effects_NB)  # one by one, as there may be many
        found["outside_max_effect"] = reduce(np.maximum, sums, np.zeros(len(gap_M))) / np.abs(gap_M)
    return StatedCircuit({name: found[name] for name in numbers}, num_groups, receipts)


def is_known(below_B: np.ndarray, groups_B: np.ndarray, seed: int) -> bool:
    """Return whether a sum can be divided by: whether its interval leaves out 0."""
    try:
        ratio_interval(below_B, below_B, groups_B, seed)
    except LumiereError:
        return False
    return True
