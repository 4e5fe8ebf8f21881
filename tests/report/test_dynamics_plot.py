"""Pictures and the interactive page of numbers along a training: what they show is what the result has."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lumiere.interpret.dynamics import Dynamics
from lumiere.report.figures.dynamics import NAMED, SCRIPT, draw_dynamics, dynamics_page, positions
from lumiere.report.figures.figure import save_figure

STEPS = [0, 1, 2, 4, 8, 16]
VOID = {"meta"}


@pytest.fixture
def result() -> Dynamics:
    """One number of the whole model, and eight heads of which the last jumps between steps 4 and 8."""
    loss = [[5.0, 4.9, 4.5, 3.0, 2.0, 1.5]]
    heads = [[0.1, 0.1, 0.1, 0.1, 0.1 + 0.01 * head, 0.1 + 0.01 * head] for head in range(7)]
    jump = [[np.nan, 0.1, 0.1, 0.1, 0.9, 0.9]]
    starts = np.array([-1] * 8 + [4])
    return Dynamics(
        steps=np.array(STEPS),
        metrics=("validation-loss",) + ("induction",) * 8,
        places=("", *(f"L1H{head}" for head in range(8))),
        units=("nats",) + ("share",) * 8,
        values=np.array(loss + heads + jump),
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


class Elements(HTMLParser):
    """Tags with their attributes, and whether each that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def elements(page: str) -> Elements:
    parser = Elements()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_panels_curves_and_phase_changes(result: Dynamics) -> None:
    curve, loss, heads = draw_dynamics(result).axes
    assert curve.lines[0].get_xdata().tolist() == positions([2, 10]).tolist()  # not beyond the last snapshot
    assert loss.get_title(loc="left") == "validation-loss (nats)"
    assert loss.lines[0].get_ydata().tolist() == result.values[0].tolist()
    assert loss.lines[1].get_ydata() == [5.2, 5.2]
    assert len(loss.patches) == 0
    drawn = [line.get_ydata() for line in heads.lines]
    for values in result.values[1:]:
        assert any(np.array_equal(values, found, equal_nan=True) for found in drawn)
    assert [text.get_text() for text in heads.get_legend().get_texts()] == ["L1H7", "L1H6", "L1H5"]
    (band,) = heads.patches
    assert [band.get_x(), band.get_x() + band.get_width()] == pytest.approx(positions([4, 8]))


def test_no_curve_has_no_panel(result: Dynamics) -> None:
    from dataclasses import replace

    bare = replace(result, curve_steps=np.array([], dtype=int), curve_losses=np.array([]))
    assert len(draw_dynamics(bare).axes) == 2
    assert "training loss" not in dynamics_page(bare, "t")


def test_step_0_has_a_place() -> None:
    assert positions([0, 1, 3, 7]).tolist() == [0, 1, 2, 3]


def test_files(result: Dynamics, tmp_path: Path) -> None:
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / f"a{suffix}"
        save_figure(path, draw_dynamics(result), "a", "b")
        assert path.read_bytes().startswith(start)


def test_the_page_needs_nothing_else_and_is_whole(result: Dynamics) -> None:
    page = dynamics_page(result, "a <b> & c")
    assert not re.search(r"https?:|src=|@import|url\(", page)
    found = elements(page).found
    assert "a &lt;b&gt; &amp; c" in page
    assert len([tag for tag, _ in found if tag == "section"]) == 3
    assert len([tag for tag, _ in found if tag == "path"]) == 1 + len(result.metrics)
    phases = [attributes for tag, attributes in found if attributes.get("class") == "phase"]
    assert len(phases) == 1
    assert "phase change: steps 4 to 8" in page
    assert "1 found in 9 series tried" in page


def test_the_page_has_the_numbers(result: Dynamics) -> None:
    page = dynamics_page(result, "t")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # pyright: ignore[reportOptionalSubscript]
    assert data["steps"] == STEPS
    asked = {attributes["data-series"] for tag, attributes in elements(page).found if tag == "output"}
    assert asked == set(data["values"])
    assert len(asked) == 1 + NAMED
    assert data["values"]["0"] == result.values[0].tolist()
    assert data["values"]["8"] == [None, 0.1, 0.1, 0.1, 0.9, 0.9]


def test_a_line_is_broken_where_there_is_no_number(result: Dynamics) -> None:
    result.values[8, 3] = np.nan
    lines = [attributes["d"] for tag, attributes in elements(dynamics_page(result, "t")).found if tag == "path"]
    assert sorted(line.count("M") for line in lines if line) == [1] * 9 + [2]
    assert not any("nan" in line for line in lines if line)


STUB = """
const found = {};
const make = dataset => ({ dataset, attributes: {}, textContent: "", setAttribute(k, v) { this.attributes[k] = v; } });
const outputs = OUTPUTS.map(series => make({ series }));
const lines = [make({}), make({})];
const listeners = {};
found.data = { textContent: DATA };
found.step = make({});
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
const svg = {
  getBoundingClientRect: () => ({ left: 100, width: 840 }), viewBox: { baseVal: { width: 420 } },
};
listeners.pointermove({ clientX: 100 + 2 * POINT + 3, target: { closest: () => svg } });
seen.push(report());
listeners.pointermove({ clientX: 0, target: { closest: () => null } });
seen.push(report());
console.log(JSON.stringify(seen));
"""


def test_keys_and_pointer_move_along_the_snapshots(result: Dynamics, tmp_path: Path) -> None:
    """The page's own script, run by Node on a page that is just large enough."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the page's script with")
    page = dynamics_page(result, "t")
    text = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]  # pyright: ignore[reportOptionalSubscript]
    places = json.loads(text)["places"]
    stub = STUB.replace("OUTPUTS", '["0", "8"]').replace("DATA", json.dumps(text))
    (tmp_path / "page.cjs").write_text(stub + SCRIPT + DRIVE.replace("POINT", str(places[3])))
    done = subprocess.run([node, "page.cjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

    def at(index: int) -> list[object]:
        step = f"step {STEPS[index]} (point at a panel, or use the arrow keys)"
        values = result.values[[0, 8], index]
        return [step, places[index], *("none" if np.isnan(value) else f"{value:.3f}" for value in values)]

    # At first the last; Home, right, left, left beyond the start, End, right beyond the end, a key that does nothing.
    assert json.loads(done.stdout) == [at(index) for index in (5, 0, 1, 0, 0, 5, 5, 5, 3, 3)]
