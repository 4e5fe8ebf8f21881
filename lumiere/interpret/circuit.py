"""Find the edges that a behavior needs: cut each edge of the model's graph, and compare cheaper methods with that.

Shapes: B pair of prompts, N edge, C number of points of the curve.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch

from lumiere.errors import LumiereError, check_choice
from lumiere.interpret.acdc import acdc
from lumiere.interpret.bootstrap import ratio_interval, resampled_counts
from lumiere.interpret.edge_ablation import EdgeRuns
from lumiere.interpret.edge_attribution import edge_attribution, integrated_attribution
from lumiere.interpret.edges import count_edges
from lumiere.interpret.faithfulness import (
    area,
    curve,
    faithfulness,
    incompleteness,
    needed,
    random_circuits,
)
from lumiere.interpret.metrics import default_metric, find_metric
from lumiere.interpret.prompts import PromptPairs
from lumiere.interpret.result import Receipt, Result, float64, relative_error, rounding
from lumiere.models.transformer import Transformer

METHODS = ("exact", "eap", "eap-ig")
"""By what the edges are ranked: the effect of cutting each, or one of its estimates."""
THRESHOLD = 0.01
"""Share of the difference between clean and corrupt prompts from which an edge belongs to the circuit."""
MAX_EDGES = 20_000
CHECKED_EDGES, RANDOM_CIRCUITS = 20, 20
EDGES_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Circuit(Result):
    """The effect of each edge on a metric, the circuit of those above a threshold, and what it does alone.

    Effects are positive where the edge helps. Shares are of the difference between the clean and the corrupt prompts.

    Attributes:
        metric: A name of `METRIC_NAMES`, in words.
        ablation: What cut edges carry, one of `ABLATIONS`.
        method: What `effects` are, one of `METHODS`: the metric lost when the edge is cut, or an estimate of it.
        threshold: Share from which an edge belongs to the circuit, without its sign.
        num_prompts, num_groups: B, and groups of prompts that the bootstrap resamples.
        clean, corrupt, empty: Mean metric of the clean prompts, the corrupt ones, and with all edges cut.
        writers, readers: All names, in the order of the computation.
        sources, targets: (N,) the writer and the reader of each edge.
        effects: (N,) mean over the prompts, in units of the metric.
        shares: (N,) of the difference.
        low, high: (N,) the limits of their 95% intervals over prompts; NaN for fewer than 8 prompts.
        inclusion: (N,) the share of resamples of the prompts in which the edge is in the circuit; NaN as above.
        in_circuit: (N,) whether it is.
        attribution: (N,) the estimates of `edge_attribution`, as shares.
        integrated: (N,) those of `integrated_attribution`.
        integrated_total: What those of the embedding's edges add up to; 1, but for the error of the quadrature, if cut
            edges carry the corrupt prompts.
        acdc: (2, N) which edges ACDC keeps, writers in reverse order and in order; all true if `method` is not exact.
        approximations: Names of the cheaper methods.
        correlations: Spearman's rank correlation of their scores with the effects, both without sign; NaN for ACDC.
        precisions, recalls: Of their circuits at the same threshold, against `in_circuit`.
        sizes: Of their circuits.
        faithful: Faithfulness of the circuit.
        complement: That of all other edges together.
        random: (20,) that of random circuits of the same size.
        incomplete: Of `incompleteness`; 0 is complete; NaN, as `needed`, above `max_edges`.
        num_subsets: Of the circuit, from which it was computed.
        needed: (N,) of `needed`: the largest change of the faithfulness when an edge of the circuit is cut.
        curve_sizes, curve: (C,) numbers of edges, those with the largest effects, and their faithfulness.
        cpr, cmd: Areas of MIB (Mueller et al. 2025): under the curve for edges with the highest effects, signs counted
            (higher is better), and between the curve and 1 (0 is best).
    """

    DISCRETE: ClassVar[frozenset[str]] = frozenset(
        {"in_circuit", "acdc", "inclusion", "correlations", "precisions", "recalls", "sizes", "needed", "curve"}
    )

    metric: str
    ablation: str
    method: str
    threshold: float
    num_prompts: int
    num_groups: int
    clean: float
    corrupt: float
    empty: float
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    effects: np.ndarray
    shares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    inclusion: np.ndarray
    in_circuit: np.ndarray
    attribution: np.ndarray
    integrated: np.ndarray
    integrated_total: float
    acdc: np.ndarray
    approximations: tuple[str, ...]
    correlations: np.ndarray
    precisions: np.ndarray
    recalls: np.ndarray
    sizes: np.ndarray
    faithful: float
    complement: float
    random: np.ndarray
    incomplete: float
    num_subsets: int
    needed: np.ndarray
    curve_sizes: np.ndarray
    curve: np.ndarray
    cpr: float
    cmd: float

    @property
    def names(self) -> tuple[str, ...]:
        """(N,) such as `embed->L0H1.v`."""
        return tuple(f"{source}->{target}" for source, target in zip(self.sources, self.targets, strict=True))

    @property
    def order(self) -> np.ndarray:
        """(N,) from the largest effect, without its sign, to the smallest."""
        return np.argsort(-np.abs(self.shares), kind="stable")

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, and the graph in node-link form, as `networkx.node_link_graph` reads it."""
        nodes = [{"id": name} for name in dict.fromkeys((*self.writers, *self.readers))]
        links = [
            {
                "source": self.sources[edge],
                "target": self.targets[edge],
                "effect": float(self.effects[edge]),
                "share": float(self.shares[edge]),
                "in_circuit": bool(self.in_circuit[edge]),
            }
            for edge in range(len(self.sources))
        ]
        graph = {"directed": True, "multigraph": False, "graph": {}, "nodes": nodes, "links": links}
        return {**super().as_dict(), "graph": graph}

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for edge in self.order:
            yield {
                "source": self.sources[edge],
                "target": self.targets[edge],
                **{
                    name: getattr(self, name)[edge].item()
                    for name in ("effects", "shares", "low", "high", "inclusion", "in_circuit", "attribution")
                },
            }


def find_circuit(
    model: Transformer,
    pairs: PromptPairs,
    metric: str | None = None,
    ablation: str = "corrupt",
    method: str = "exact",
    threshold: float = THRESHOLD,
    max_edges: int = MAX_EDGES,
    seed: int = 0,
) -> Circuit:
    """Return the effect of cutting each edge, `metric(clean) - metric(clean with the edge cut)`, and the circuit.

    All positions of an edge are cut at once. A cut edge carries what `ablation` says, the norm of its reader is
    computed again, and everything behind the reader follows: path patching (Goldowsky-Dill et al. 2023,
    arXiv:2304.05969).

    Args:
        metric: A name of `METRIC_NAMES`; default: `default_metric`.
        ablation: One of `ABLATIONS`.
        method: One of `METHODS`.
        threshold: Share of the difference between clean and corrupt prompts.
        max_edges: That are cut one by one, and up to which completeness and minimality are computed.
        seed: Of the bootstrap, and of the subsets that completeness and minimality look at.

    Raises:
        LumiereError: No such metric, ablation or method; the metric hardly differs between the prompts; more edges
            than `max_edges` and the method is exact.
    """
    check_choice("method", method, METHODS)
    pairs = pairs.with_predictions(model).to(next(model.parameters()).device)
    with torch.inference_mode():
        started = perf_counter()
        clean_BV = pairs.read(model.logits(pairs.clean))
        seconds = perf_counter() - started
        if method == "exact":
            check_size(count_edges(model), max_edges, seconds)
        runs = EdgeRuns(model, pairs, find_metric(metric or default_metric(pairs), clean_BV), ablation)
    attribution_NB = edge_attribution(runs).numpy()
    integrated_NB = integrated_attribution(runs).numpy()
    with torch.inference_mode():
        clean_B = float64(runs.clean_B)
        gap_B = clean_B - float64(runs.corrupt_B)
        cut_NB = runs.each_edge().numpy() if method == "exact" else None
        effects_NB = (
            clean_B - cut_NB if cut_NB is not None else {"eap": attribution_NB, "eap-ig": integrated_NB}[method]
        )
        shares, low, high = np.concatenate(
            [  # in parts, as each edge has a thousand resamples
                ratio_interval(effects_NB[first : first + EDGES_AT_ONCE], gap_B, pairs.groups, seed)
                for first in range(0, len(effects_NB), EDGES_AT_ONCE)
            ],
            axis=1,
        )
        in_circuit = np.abs(shares) >= threshold
        attribution, integrated = (scores_NB.sum(1) / gap_B.sum() for scores_NB in (attribution_NB, integrated_NB))
        kept = np.ones((2, len(shares)), dtype=bool)
        if cut_NB is not None:
            change = threshold * abs(gap_B.mean())
            kept = np.stack([acdc(runs, change, is_reversed).numpy() for is_reversed in (True, False)])
        found = {"EAP": np.abs(attribution) >= threshold, "EAP-IG": np.abs(integrated) >= threshold}
        if cut_NB is not None:
            found |= {"ACDC, writers last to first": kept[0], "ACDC, first to last": kept[1]}
        circuit_N = torch.from_numpy(in_circuit).float()
        random_RN = random_circuits(len(shares), int(in_circuit.sum()), RANDOM_CIRCUITS, seed)
        faithful, complement, *others = faithfulness(
            runs, torch.cat([torch.stack([circuit_N, 1 - circuit_N]), random_RN])
        )
        incomplete, num_subsets, changes_N = float("nan"), 0, np.full(len(shares), np.nan)
        if runs.num_edges <= max_edges:
            incomplete, num_subsets = incompleteness(runs, circuit_N, seed)
            changes_N = needed(runs, circuit_N, seed)
        curve_sizes, heights = curve(runs, np.abs(shares))
        _, signed = curve(runs, shares)
        return Circuit(
            metric=metric or default_metric(pairs),
            ablation=ablation,
            method=method,
            threshold=threshold,
            num_prompts=len(pairs),
            num_groups=len(np.unique(pairs.groups)),
            clean=float(clean_B.mean()),
            corrupt=float(clean_B.mean() - gap_B.mean()),
            empty=float(runs.cut(torch.ones(1, runs.num_edges)).mean()),
            writers=runs.graph.writers,
            readers=tuple(reader.name for reader in runs.graph.readers),
            sources=tuple(source for source, _ in runs.graph.names),
            targets=tuple(target for _, target in runs.graph.names),
            effects=effects_NB.mean(1),
            shares=shares,
            low=low,
            high=high,
            inclusion=inclusion_of(effects_NB, gap_B, pairs.groups, threshold, seed),
            in_circuit=in_circuit,
            attribution=attribution,
            integrated=integrated,
            integrated_total=float(
                sum(integrated[edge] for edge, (source, _) in enumerate(runs.graph.names) if source == "embed")
            ),
            acdc=kept,
            approximations=tuple(found),
            correlations=np.array(
                [spearman(scores, shares) for scores in (attribution, integrated)] + [np.nan] * (len(found) - 2)
            ),
            precisions=np.array([share_of(is_found & in_circuit, is_found) for is_found in found.values()]),
            recalls=np.array([share_of(is_found & in_circuit, in_circuit) for is_found in found.values()]),
            sizes=np.array([int(is_found.sum()) for is_found in found.values()]),
            faithful=float(faithful),
            complement=float(complement),
            random=np.array(others),
            incomplete=incomplete,
            num_subsets=num_subsets,
            needed=changes_N,
            curve_sizes=curve_sizes,
            curve=heights,
            cpr=area(curve_sizes, signed, len(shares)),
            cmd=area(curve_sizes, np.abs(1 - heights), len(shares)),
            receipts=receipts_of(runs, cut_NB, seed),
        )


def check_size(num_edges: int, max_edges: int, seconds: float) -> None:
    """Refuse to cut more edges than wanted.

    Args:
        seconds: Of one forward pass of all clean prompts.

    Raises:
        LumiereError: There are more.
    """
    if num_edges > max_edges:
        minutes = num_edges * seconds / 2 / 60  # half of the layers are not computed again
        raise LumiereError(
            f"the model has {num_edges:,} edges, more than {max_edges:,}: about {minutes:.0f} minutes",
            f"add --by eap, which estimates all of them at once, or --max-edges {num_edges}",
        )


def receipts_of(runs: EdgeRuns, cut_NB: np.ndarray | None, seed: int) -> tuple[Receipt, ...]:
    """Check the runs with no edge and with all edges cut, nodes against edges, and some edges one by one."""
    tolerance = rounding(runs.model)
    num_edges = runs.num_edges
    none_B, all_B = runs.cut(torch.stack([torch.zeros(num_edges), torch.ones(num_edges)]))
    errors = {"with no edge cut, the clean run": relative_error(none_B, runs.clean_B.double().cpu())}
    if runs.ablation == "corrupt":
        errors["with all edges cut, the corrupt run"] = relative_error(all_B, runs.corrupt_B.double().cpu())
    generator = torch.Generator().manual_seed(seed)
    writer = int(torch.randint(len(runs.graph.writers), (), generator=generator))
    leaves_N = torch.tensor([float(source == writer) for _, source in runs.graph.edges])
    name = f"all edges of {runs.graph.writers[writer]} cut, its output replaced by a hook"
    errors[name] = relative_error(runs.cut(leaves_N[None])[0], runs.replace_writer(writer))
    if cut_NB is not None:
        some = torch.randperm(num_edges, generator=generator)[:CHECKED_EDGES]
        again_RB = runs.cut(torch.eye(num_edges)[some])
        errors[f"{len(some)} edges cut in whole forward passes"] = relative_error(
            again_RB, torch.from_numpy(cut_NB)[some]
        )
    return tuple(Receipt(check, error, tolerance) for check, error in errors.items())


def inclusion_of(
    effects_NB: np.ndarray, gap_B: np.ndarray, groups_B: np.ndarray, threshold: float, seed: int
) -> np.ndarray:
    """Return the share of resamples of the prompts in which each edge is in the circuit, (N,)."""
    counts_RB = resampled_counts(groups_B, seed)
    if counts_RB is None:
        return np.full(len(effects_NB), np.nan)
    gaps_R = gap_B @ counts_RB.T
    return np.array([(np.abs(effects_B @ counts_RB.T / gaps_R) >= threshold).mean() for effects_B in effects_NB])


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return the rank correlation of two lists of numbers without their signs; equal numbers share a rank."""
    ranks = []
    for values in (np.abs(first), np.abs(second)):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    if min(np.ptp(rank) for rank in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def share_of(part: np.ndarray, whole: np.ndarray) -> float:
    """Return the number of true values in `part` by that in `whole`; NaN without any."""
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")
