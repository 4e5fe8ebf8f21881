"""`run.inspect`: prompts, options, notes, and results as attributes, tables, files and pictures in a notebook."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lumiere
from lumiere.api.analysis import Analysis
from lumiere.interpret.attention import attention_patterns
from lumiere.interpret.result import Receipt
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run

PROMPT = "One day a fox"
README = Path(__file__).parents[2] / "README.md"
ANALYSES: dict[str, Callable[[lumiere.OpenedRun], Analysis[Any]]] = {
    "weights": lambda run: run.inspect.weights(layer=1),
    "summary": lambda run: run.inspect.summary(windows=2),
    "attention": lambda run: run.inspect.attention(PROMPT),
    "heads": lambda run: run.inspect.heads(),
    "lens": lambda run: run.inspect.lens(PROMPT),
    "logits": lambda run: run.inspect.logits(PROMPT),
    "ablate": lambda run: run.inspect.ablate(batches=1, batch_size=2),
    "patch": lambda run: run.inspect.patch("One day a fox", "One day a dog", target="b", vs="c"),
    "probe": lambda run: run.inspect.probe(regex="e", file=README, windows=40, layer=0),
    "steer": lambda run: run.inspect.steer(PROMPT, token="e", batches=1, batch_size=2),
    "tokens": lambda run: run.inspect.tokens(PROMPT),
    "cache": lambda run: run.inspect.cache(PROMPT),
    "dynamics": lambda run: run.inspect.dynamics(metric="norm"),
    "diff": lambda run: run.inspect.diff("latest@4", PROMPT),
}


@pytest.fixture
def run(trained_run: Run) -> lumiere.OpenedRun:
    return lumiere.open(trained_run.path)


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_has_a_picture_that_stays_in_its_place(run: lumiere.OpenedRun, name: str) -> None:
    """Two pictures in one page share no id, every reference is within its picture, and no style reaches the page."""
    found = ANALYSES[name](run)
    assert found.name == found.provenance["analysis"] == name
    shown = found._repr_html_()
    ElementTree.fromstring(shown)
    ids = re.findall(r'\bid="([^"]*)"', shown)
    assert len(ids) > 5
    assert set(Counter(ids).values()) == {1}
    assert set(re.findall(r'(?:url\(#|href="#)([^")]*)', shown)) <= set(ids)
    if name == "attention":
        assert not set(ids) & set(re.findall(r'\bid="([^"]*)"', found._repr_html_()))
    assert not re.search(r"<(style|script|link|body)", shown)
    assert "currentColor" in shown
    assert f"{run.name}, checkpoint best" in shown or name == "dynamics"
    assert f"{len(found.receipts)} check" in shown


def test_the_result_is_that_of_the_analysis(run: lumiere.OpenedRun) -> None:
    found = run.inspect.attention(PROMPT, layer=1, head=[1, 0])
    tokens = run.tokenizer.encode(PROMPT, start=True)
    expected = attention_patterns(run.model, tokens, [1], [1, 0], "pattern")
    assert np.array_equal(found.patterns, expected.patterns)
    assert found.holds
    assert found.provenance["token_ids"] == tokens
    assert "patterns" in dir(found)
    assert found.frame()["weight"].tolist() == [row["weight"] for row in expected.rows()]
    for prompt, layer in ((tokens, "1"), (PROMPT, -1)):
        assert np.array_equal(run.inspect.attention(prompt, layer=layer, head="1,0").patterns, found.patterns)
    assert run.inspect.attention(torch.tensor(tokens).tolist()).provenance["source"] == "token ids"
    with pytest.raises(AttributeError):
        _ = found.pattern


def test_numbers_and_pictures_are_saved(run: lumiere.OpenedRun) -> None:
    found = run.inspect.tokens(PROMPT, verify=True, seed=4)
    assert found.receipts[-1].check == "the same in float64"
    for suffix in ("json", "csv", "npz", "svg", "html"):
        found.save(f"tokens.{suffix}")
    numbers = json.loads(Path("tokens.json").read_text())
    assert numbers["losses"] == found.losses.tolist()
    assert (numbers["run"], numbers["seed"]) == (run.name, 4)
    with pytest.raises(lumiere.LumiereError):
        found.save("tokens.pdf")


@pytest.mark.parametrize(
    "analysis",
    [
        lambda inspect: inspect.attention(" "),
        lambda inspect: inspect.attention([]),
        lambda inspect: inspect.attention([320]),
        lambda inspect: inspect.attention([-1]),
        lambda inspect: inspect.attention([5] * 17),
        lambda inspect: inspect.attention(PROMPT, val=1),
        lambda inspect: inspect.attention(PROMPT, layer=2),
        lambda inspect: inspect.attention(PROMPT, kind="pattrn"),
        lambda inspect: inspect.lens(PROMPT, target=320),
        lambda inspect: inspect.diff("zzz"),
        lambda inspect: inspect.report([5]),
        lambda inspect: inspect.report().save("page.htm"),
    ],
)
def test_bad_input_is_refused(run: lumiere.OpenedRun, analysis: Callable[[Any], object]) -> None:
    with pytest.raises(lumiere.LumiereError):
        analysis(run.inspect)


def test_an_unknown_option_is_a_wrong_call(run: lumiere.OpenedRun) -> None:
    wrong: Any = {"lyer": 1}
    with pytest.raises(TypeError, match="lyer"):
        run.inspect.attention(PROMPT, **wrong)


def test_the_analyses_see_changed_weights(trained_run: Run) -> None:
    run = lumiere.open(trained_run.path)
    with torch.no_grad():
        run.model.token_embedding.weight.zero_()
    # Without an embedding all tokens are equally probable.
    assert run.inspect.tokens(PROMPT).losses == pytest.approx(np.log(320))
    sides = run.inspect.diff("latest", PROMPT).provenance
    assert sides["weights_sha256"] != sides["other"]["weights_sha256"]


def test_what_is_left_out_is_noted(run: lumiere.OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "record", RunRecord(corpus_sha256="another"))
    found = run.inspect.tokens(PROMPT)
    assert found.bigram_losses is None
    assert len(found.notes) == 1
    assert "no baselines" in found._repr_html_()


def test_without_matplotlib_a_notebook_says_so(run: lumiere.OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = run.inspect.attention(PROMPT)._repr_html_()
    assert "pip install matplotlib" in shown
    assert "<svg" not in shown
    assert f"{run.name}, checkpoint best" in shown


def test_texts_are_escaped_and_failed_checks_shown(run: lumiere.OpenedRun) -> None:
    found = run.inspect.attention("<b>")
    failed = Receipt("a < b", 1.0, 0.5)
    object.__setattr__(found.result, "receipts", (*found.receipts, failed))
    shown = found._repr_html_()
    assert "1 of 3 checks FAILED" in shown
    assert "FAILED: a &lt; b" in shown
    assert "<b>&lt;" not in shown
    generated = run.generate("<i>", max_new_tokens=3, seed=1)
    assert "&lt;i&gt;" in generated._repr_html_()


def test_snapshots_are_followed_with_progress(run: lumiere.OpenedRun) -> None:
    seen: list[tuple[int, int]] = []
    found = run.inspect.dynamics(metric=["norm"], every=2, progress=lambda *done: seen.append(done))
    assert len(found.steps) == len(seen)
    assert seen[-1] == (len(seen), len(seen))


def test_the_report_is_a_page_in_a_frame(run: lumiere.OpenedRun) -> None:
    found = run.inspect.report(PROMPT)
    found.save("page.html")
    assert Path("page.html").read_text() == found.page
    frame = ElementTree.fromstring(found._repr_html_())
    assert (frame.get("srcdoc") or "").split() == found.page.split()
    assert frame.get("sandbox") == "allow-scripts"
    assert not found.failed
