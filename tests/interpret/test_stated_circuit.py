"""Circuits that are given: compiled ones that are right or lack an edge, and numbers by single runs."""

import numpy as np
import pytest

from lumiere.errors import LumiereError
from lumiere.interpret.bootstrap import resampled_counts
from lumiere.interpret.circuit import find_circuit
from lumiere.interpret.edge_ablation import EdgeRuns
from lumiere.interpret.metrics import logit_difference
from lumiere.interpret.prompts import PromptPairs
from lumiere.interpret.stated_circuit import StatedCircuit, state_circuit
from lumiere.lab.circuits import KnownCircuit, known_circuit
from tests.interpret.test_circuit import pairs_of


@pytest.fixture(scope="module")
def known() -> KnownCircuit:
    return known_circuit("sort", pairs=8)


def stated(known: KnownCircuit, omitted: int = 0, pairs: PromptPairs | None = None) -> StatedCircuit:
    edges = [f"{source}->{target}" for source, target in known.edges]
    return state_circuit(known.model, pairs or pairs_of(known), edges[omitted:])


def test_the_edges_of_the_construction_do_everything(known: KnownCircuit) -> None:
    found = stated(known)
    assert all(receipt.holds for receipt in found.receipts)
    assert found.num_groups == 8
    assert {len(draws) for draws in found.numbers.values()} == {1001}
    assert found.numbers["faithfulness"] == pytest.approx(1, abs=1e-3)
    assert found.numbers["outside_max_effect"] == pytest.approx(0, abs=1e-3)
    assert found.numbers["random_same_size"] == pytest.approx(0, abs=0.1)


def test_without_an_edge_of_it_a_circuit_lacks_what_that_edge_does(known: KnownCircuit) -> None:
    """Edges outside do nothing here: cutting them too changes nothing."""
    found = stated(known, omitted=1)
    everything = find_circuit(known.model, pairs_of(known))
    missing = everything.shares[everything.names.index("->".join(known.edges[0]))]
    assert missing > 0.1
    assert found.numbers["faithfulness"][0] == pytest.approx(1 - missing, abs=1e-3)
    assert found.numbers["outside_max_effect"][0] == pytest.approx(missing)


def test_resamples_are_ratios_of_sums_over_the_drawn_pairs() -> None:
    """From the numbers of single pairs, which have no resamples; their differences are of several sizes."""
    known = known_circuit("proportion", pairs=8)
    pairs = pairs_of(known)
    each = [stated(known, 0, pairs.select([row])).numbers for row in range(8)]
    assert {len(values) for numbers in each for values in numbers.values()} == {1}
    runs = EdgeRuns(known.model, pairs, logit_difference)
    gap_B = (runs.clean_B - runs.corrupt_B).detach().numpy()
    assert gap_B.std() > 0.1 * gap_B.mean()
    counts_RB = resampled_counts(pairs.groups)
    assert counts_RB is not None
    found = stated(known).numbers
    for name in ("faithfulness", "random_same_size"):
        shares_B = np.concatenate([numbers[name] for numbers in each])
        assert found[name][1:] == pytest.approx(counts_RB @ (shares_B * gap_B) / (counts_RB @ gap_B))


def test_without_a_difference_between_the_prompts_nothing_is_known(known: KnownCircuit) -> None:
    pairs = pairs_of(known)
    twice = PromptPairs(pairs.clean, pairs.clean, pairs.positions, pairs.targets, pairs.versus, pairs.groups)
    assert all(np.isnan(values).all() for values in stated(known, pairs=twice).numbers.values())


def test_an_edge_that_the_model_lacks_is_refused_with_the_nearest(known: KnownCircuit) -> None:
    for name, hint in (("embed->L0H9.q", "did you mean embed->L0H"), ("L0H0", "inspect circuit")):
        with pytest.raises(LumiereError, match="has no edge") as error:
            state_circuit(known.model, pairs_of(known), [name])
        assert hint in (error.value.hint or "")
