"""The picture of a circuit: its edges, as wide as their effects, with their numbers under the mouse."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import FancyBboxPatch, PathPatch

from lumiere.interpret.circuit import Circuit, find_circuit
from lumiere.interpret.prompts import PromptPairs
from lumiere.lab.circuits import known_circuit
from lumiere.report.figures.circuit import bend_of, draw_circuit
from lumiere.report.figures.figure import save_picture


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    known = known_circuit("greater-than", pairs=4)
    pairs = PromptPairs(known.clean, known.corrupt, known.positions, known.targets, known.versus, np.arange(4))
    return find_circuit(known.model, pairs, method="eap")


def lines_of(circuit: Circuit) -> list[PathPatch]:
    (axes,) = draw_circuit(circuit).figure.axes
    return [patch for patch in axes.patches if type(patch) is PathPatch]


def test_each_edge_of_the_circuit_is_drawn(circuit: Circuit) -> None:
    lines = lines_of(circuit)
    names = {str(line.get_gid()).removeprefix("hover ").partition(":")[0] for line in lines}
    assert names == {name for name, is_in in zip(circuit.names, circuit.in_circuit, strict=True) if is_in}
    (axes,) = draw_circuit(circuit).figure.axes
    assert len([patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]) == 4


def test_an_edge_is_as_wide_as_its_effect(circuit: Circuit) -> None:
    shares = circuit.shares.copy()
    first, second, *_ = np.flatnonzero(circuit.in_circuit)
    shares[first], shares[second] = 0.5, -0.25
    lines = {str(line.get_gid()).split(": ")[0]: line for line in lines_of(dataclasses.replace(circuit, shares=shares))}
    strong, weak = (lines[f"hover {circuit.names[edge]}"] for edge in (first, second))
    assert (strong.get_linewidth() - 0.5) == pytest.approx(2 * (weak.get_linewidth() - 0.5))
    assert (strong.get_linestyle(), weak.get_linestyle()) == ("-", "--")


def test_the_numbers_are_titles_of_the_svg(circuit: Circuit) -> None:
    save_picture(Path("circuit.svg"), draw_circuit(circuit))
    titles = re.findall("<title>(.*?)</title>", Path("circuit.svg").read_text())
    assert len([title for title in titles if "-&gt;" in title]) == circuit.in_circuit.sum()
    assert any(title.endswith(f"({circuit.effects[circuit.order[0]]:+.4g})") for title in titles)


def test_without_edges_the_picture_says_so(circuit: Circuit) -> None:
    nothing = dataclasses.replace(circuit, in_circuit=np.zeros_like(circuit.in_circuit))
    (axes,) = draw_circuit(nothing).figure.axes
    assert [text.get_text() for text in axes.texts] != []
    assert lines_of(nothing) == []


def test_an_edge_passes_between_the_nodes_of_a_row() -> None:
    """Nodes of four are at -1.5, -0.5, 0.5 and 1.5, and gaps at -1, 0 and 1."""
    assert bend_of(0.4, [4]) == pytest.approx((0 - 0.4) / 0.75)
    assert abs(bend_of(0.0, [3])) == pytest.approx(0.5 / 0.75)
    assert bend_of(0.0, []) == bend_of(2.5, [4]) == 0
