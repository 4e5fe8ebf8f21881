"""Metrics over training: picture and interactive page show the numbers of the result."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from lumiere.interpret.dynamics import Dynamics
from lumiere.report.figures.dynamics import PAGE_SERIES, draw_dynamics, dynamics_page, log_steps
from lumiere.report.rendering import asset

STEPS = [0, 1, 2, 4, 8, 16]


@pytest.fixture
def result() -> Dynamics:
    """One metric of the whole model, and eight heads of which the last jumps between steps 4 and 8."""
    heads = [[0.1, 0.1, 0.1, 0.1, 0.1 + 0.01 * head, 0.1 + 0.01 * head] for head in range(7)]
    starts = np.array([-1] * 8 + [4])
    return Dynamics(
        steps=np.array(STEPS),
        metrics=("validation-loss",) + ("induction",) * 8,
        places=("", *(f"L1H{head}" for head in range(8))),
        units=("nats",) + ("share",) * 8,
        values=np.array([[5.0, 4.9, 4.5, 3.0, 2.0, 1.5], *heads, [np.nan, 0.1, 0.1, 0.1, 0.9, 0.9]]),
        errors=np.array([[0.1] * 6] + [[np.nan] * 6] * 8),
        baselines=np.array([5.2] + [0.05] * 8),
        phase_starts=starts,
        phase_ends=np.where(starts > 0, 8, -1),
        phase_sizes=np.where(starts > 0, 0.8, np.nan),
        num_tried=9,
        curve_steps=np.array([2, 10, 20]),
        curve_losses=np.array([4.6, 1.9, 1.2]),
        receipts=(),
    )


def elements(page: str, tag: str) -> list[str]:
    """The attributes of each element of a kind."""
    return re.findall(rf"<{tag}\b([^>]*)>", page)


def data_of(page: str) -> tuple[str, Any]:
    text = page.split('id="data">')[1].split("</script>")[0]
    return text, json.loads(text)


def test_the_picture_has_panels_curves_and_phase_changes(result: Dynamics) -> None:
    axes: list[Any] = draw_dynamics(result).figure.axes
    curve, loss, heads = axes
    assert curve.lines[0].get_xdata().tolist() == log_steps([2, 10]).tolist()  # not beyond the last snapshot
    assert loss.lines[0].get_ydata().tolist() == result.values[0].tolist()
    assert loss.lines[1].get_ydata() == [5.2, 5.2]
    assert len(loss.patches) == 0
    drawn = [line.get_ydata() for line in heads.lines]
    for values in result.values[1:]:
        assert any(np.array_equal(values, found, equal_nan=True) for found in drawn)
    assert [text.get_text() for text in heads.get_legend().get_texts()] == ["L1H7", "L1H6", "L1H5"]
    (band,) = heads.patches
    assert [band.get_x(), band.get_x() + band.get_width()] == pytest.approx(log_steps([4, 8]))
    assert log_steps([0, 1, 3, 7]).tolist() == [0, 1, 2, 3]


def test_without_a_training_curve_there_is_no_panel_of_it(result: Dynamics) -> None:
    bare = replace(result, curve_steps=np.array([], dtype=int), curve_losses=np.array([]))
    assert len(draw_dynamics(bare).figure.axes) == 2
    assert len(elements(dynamics_page(bare, "t"), "section")) == 2


def test_the_page_is_self_contained_and_has_the_numbers(result: Dynamics) -> None:
    result.values[7, 3] = np.nan
    page = dynamics_page(result, "a </script> <b> & c")
    assert not re.search(r"https?:|src=|@import|url\(", page)
    assert "a &lt;/script&gt; &lt;b&gt; &amp; c" in page
    for panel in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(panel)  # every tag is closed
    assert len(elements(page, "section")) == 3
    assert sum('class="phase"' in rect for rect in elements(page, "rect")) == 1
    _, data = data_of(page)
    assert data["steps"] == STEPS
    outputs = [re.findall(r'data-series="(\d+)"', output) for output in elements(page, "output")]
    assert {series for (series,) in outputs} == set(data["values"])
    assert len(data["values"]) == 1 + PAGE_SERIES
    assert data["values"]["0"] == result.values[0].tolist()
    assert data["values"]["8"] == [None, 0.1, 0.1, 0.1, 0.9, 0.9]
    lines = [re.findall(r'\bd="([^"]*)"', path)[0] for path in elements(page, "path")]
    assert sorted(line.count("M") for line in lines) == [1] * 9 + [2], "interrupted at missing values"
    assert "nan" not in "".join(lines)


STUB = """
const make = dataset => ({ dataset, attributes: {}, textContent: "", setAttribute(k, v) { this.attributes[k] = v; } });
const outputs = ["0", "8"].map(series => make({ series }));
const lines = [make({}), make({})];
const listeners = {};
const found = { data: { textContent: DATA }, step: make({}) };
found.panels = { addEventListener: (name, call) => { listeners[name] = call; } };
globalThis.document = {
  getElementById: id => found[id],
  querySelectorAll: name => (name === "output" ? outputs : lines),
};
const report = () => [found.step.textContent, lines[1].attributes.x1, ...outputs.map(cell => cell.textContent)];
const key = name => { listeners.keydown({ key: name, preventDefault() {} }); seen.push(report()); };
const seen = [];
"""
DRIVE = """
seen.push(report());
for (const name of ["Home", "ArrowRight", "ArrowLeft", "ArrowLeft", "End", "ArrowRight", "Tab"]) key(name);
const svg = { getBoundingClientRect: () => ({ left: 100, width: 840 }), viewBox: { baseVal: { width: 420 } } };
listeners.pointermove({ clientX: 100 + 2 * POINT + 3, target: { closest: () => svg } });
seen.push(report());
listeners.pointermove({ clientX: 0, target: { closest: () => null } });
seen.push(report());
console.log(JSON.stringify(seen));
"""


def test_keys_and_pointer_move_along_the_snapshots(result: Dynamics, tmp_path: Path) -> None:
    """Run the page's own script in Node on a minimal page."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    text, data = data_of(dynamics_page(result, "t"))
    places = data["places"]
    script = STUB.replace("DATA", json.dumps(text)) + asset("dynamics.js") + DRIVE.replace("POINT", str(places[3]))
    (tmp_path / "page.cjs").write_text(script)
    done = subprocess.run([node, "page.cjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

    def at(index: int) -> list[object]:
        step = f"step {STEPS[index]} (point at a panel, or use the arrow keys)"
        values = result.values[[0, 8], index]
        return [step, places[index], *("none" if np.isnan(value) else f"{value:.3f}" for value in values)]

    # Initially the last; Home, right, left, left beyond the start, End, right beyond the end, a key without effect.
    assert json.loads(done.stdout) == [at(index) for index in (5, 0, 1, 0, 0, 5, 5, 5, 3, 3)]
