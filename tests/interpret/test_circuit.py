"""Circuits whose edges are known, and the parts of the result by hand."""

from dataclasses import fields

import numpy as np
import pytest
import scipy.stats
import torch

from lumiere.errors import LumiereError
from lumiere.interpret.circuit import Circuit, find_circuit, spearman
from lumiere.interpret.edge_ablation import EdgeRuns
from lumiere.interpret.faithfulness import area
from lumiere.interpret.metrics import logit_difference
from lumiere.interpret.prompts import PromptPairs
from lumiere.lab.circuits import TASKS, KnownCircuit, known_circuit

FOUND_ALONE = [name for name in TASKS if name != "redundant"]


def pairs_of(known: KnownCircuit) -> PromptPairs:
    groups = np.arange(len(known.clean))
    return PromptPairs(known.clean, known.corrupt, known.positions, known.targets, known.versus, groups)


def found_edges(circuit: Circuit, is_found: np.ndarray) -> set[tuple[str, str]]:
    return {(circuit.sources[edge], circuit.targets[edge]) for edge in np.flatnonzero(is_found)}


@pytest.mark.parametrize("name", FOUND_ALONE)
def test_cutting_every_edge_finds_the_known_circuit(name: str) -> None:
    """Precision and recall are 1: the edges above 1 % of the difference are those of the construction."""
    known = known_circuit(name, pairs=8, seed=2)
    runs = EdgeRuns(known.model, pairs_of(known), logit_difference)
    with torch.no_grad():
        effects = (runs.clean_B - runs.each_edge()).mean(1) / (runs.clean_B - runs.corrupt_B).mean()
    found = {edge for edge, effect in zip(runs.graph.names, effects, strict=True) if abs(effect) >= 0.01}
    assert found == set(known.edges)
    assert max(abs(effect) for edge, effect in zip(runs.graph.names, effects, strict=True) if edge not in found) < 1e-3


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    known = known_circuit("sort", pairs=8)
    return find_circuit(known.model, pairs_of(known))


def test_the_result_of_a_known_circuit(circuit: Circuit) -> None:
    known = known_circuit("sort", pairs=8)
    assert circuit.holds
    assert found_edges(circuit, circuit.in_circuit) == set(known.edges)
    assert circuit.faithful == pytest.approx(1, abs=1e-3)
    assert circuit.complement == pytest.approx(0, abs=1e-3)
    assert circuit.incomplete < 1e-3
    assert np.nanmin(circuit.needed) > 0.1
    assert np.isfinite(circuit.needed).sum() == 4
    assert abs(circuit.random).max() < 0.1
    acdc = circuit.approximations.index("ACDC, first to last")
    assert (circuit.precisions[acdc], circuit.recalls[acdc]) == (1, 1)
    assert circuit.inclusion[circuit.in_circuit].min() > 0.9
    assert circuit.inclusion[~circuit.in_circuit].max() == 0
    assert (circuit.low <= circuit.shares + 1e-12).all()
    assert (circuit.high >= circuit.shares - 1e-12).all()
    assert circuit.empty == pytest.approx(circuit.corrupt)
    assert circuit.curve[-1] == pytest.approx(1)


def test_the_graph_is_in_node_link_form(circuit: Circuit) -> None:
    graph = circuit.as_dict()["graph"]
    names = {node["id"] for node in graph["nodes"]}
    assert len(graph["links"]) == len(circuit.effects)
    assert {link[end] for link in graph["links"] for end in ("source", "target")} <= names
    strongest = next(circuit.rows())
    assert max(graph["links"], key=lambda link: abs(link["share"]))["target"] == strongest["target"]


def test_two_redundant_paths_hide_from_single_cuts_and_show_in_pairs() -> None:
    known = known_circuit("redundant", pairs=4)
    runs = EdgeRuns(known.model, pairs_of(known), logit_difference)
    names = runs.graph.names
    with torch.no_grad():
        effects = (runs.clean_B - runs.each_edge()).mean(1) / (runs.clean_B - runs.corrupt_B).mean()
        found = {edge for edge, effect in zip(names, effects, strict=True) if abs(effect) >= 0.01}
        assert found < set(known.edges)
        first, second = (edge for edge in known.edges if edge[1].endswith(".k"))
        both = torch.tensor([[float(name in (first, second)) for name in names]])
        joint = (runs.clean_B - runs.cut(both)).mean() / (runs.clean_B - runs.corrupt_B).mean()
    assert {first, second}.isdisjoint(found)
    assert joint > 0.4


def test_an_estimate_instead_of_cuts() -> None:
    known = known_circuit("greater-than", pairs=8)
    circuit = find_circuit(known.model, pairs_of(known), method="eap")
    assert circuit.shares == pytest.approx(circuit.attribution)
    assert circuit.approximations == ("EAP", "EAP-IG")
    assert circuit.holds


def test_too_many_edges_are_refused_before_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    known = known_circuit("sort", pairs=2)
    monkeypatch.delattr(EdgeRuns, "each_edge")
    with pytest.raises(LumiereError):
        find_circuit(known.model, pairs_of(known), max_edges=10)


def test_a_seed_gives_one_result() -> None:
    known = known_circuit("greater-than", pairs=8)
    first, second = (find_circuit(known.model, pairs_of(known), seed=3) for _ in range(2))
    for field in fields(first):
        if isinstance(value := getattr(first, field.name), np.ndarray):
            assert np.array_equal(value, getattr(second, field.name), equal_nan=True), field.name


def test_rank_correlation_is_that_of_scipy() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(-5, 5, (2, 40)).astype(float)
    assert spearman(first, second) == pytest.approx(scipy.stats.spearmanr(abs(first), abs(second))[0])


def test_the_area_of_mib_starts_at_the_first_point() -> None:
    """Faithful everywhere, the area is 0.999 for a curve that starts at a share of 0.001."""
    assert area(np.array([1, 500, 1000]), np.ones(3), 1000) == pytest.approx(0.999)
