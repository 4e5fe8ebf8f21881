"""The report page: its numbers are those of the analyses, and no text can break out of it."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lumiere.data.batches import batch_at
from lumiere.data.dataset import TokenizedCorpus
from lumiere.interpret.head_scores import score_heads
from lumiere.persistence.metrics import History, Point, read_history
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from lumiere.report.rendering import asset
from lumiere.report.report_page import (
    CANDIDATES,
    Inspection,
    Text,
    build_page,
    frequent_tokens,
    inspect_model,
    loss_chart,
    origins,
    page_data,
    repeat_gains,
    rounded,
    thousandths,
)
from tests.interpret.models import text_windows

TOKENS = (0, 70, 80, 90, 80, 71)
ABOUT = {
    "run": "run_<i>",
    "checkpoint": "best",
    "step": 12,
    "source": "two <b>windows</b>",
    "averaged_over": "the 5 tokens of <i>",
    "seed": 0,
    "weights_sha256": "ab" * 32,
}
REPEATED = torch.tensor([[0, 10, 11, 12, 10, 11, 12]])


@pytest.fixture(scope="module")
def inspection(trained_run: Run, tiny_corpus: TokenizedCorpus) -> Inspection:
    config = trained_run.load_config()
    batches = [batch_at(step, tiny_corpus.windows("validation", config), 4, seed=0) for step in range(2)]
    counts = np.bincount(tiny_corpus.splits["train"].ids, minlength=config.tokenizer.vocab_size)
    texts = [Text(TOKENS, "a test")]
    return inspect_model(trained_run.load_model(), texts, REPEATED, batches, token_counts=counts)


def hostile(token: int) -> str:
    return f"</script><script>alert({token})</script>\u2028&amp;'\"{{{{ 1 }}}}"


def rows(page: str, section: str) -> list[list[str]]:
    """The texts of the cells of the section's last table, header first."""
    table = page.split(f'<section id="{section}"')[1].split("</section>")[0].rpartition("<table>")[2]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("<tr>")[1:]]
    return [[re.sub("<[^>]*>", "", cell).strip() for cell in row] for row in cells]


def page_of(inspection: Inspection, run: Run, history: History | None = None) -> str:
    return build_page(inspection, run.load_config(), history or History((), ()), hostile, ABOUT)


def test_the_page_says_where_the_weights_come_from(inspection: Inspection, trained_run: Run) -> None:
    grandparent = {"run": "run_<a>", "checkpoint": "best", "step": 7, "dataset": "/home/me/tales.txt"}
    parent = {"run": "run_b", "checkpoint": "latest", "step": 9, "parent": grandparent}
    found = origins(RunRecord.from_json({"parent": parent}))
    page = build_page(inspection, trained_run.load_config(), History((), ()), hostile, ABOUT, found)
    for expected in ("run_&lt;a&gt;", "run_b", "step 7", "step 9", "tales.txt"):
        assert expected in page
    assert "/home/me" not in page
    imported = RunRecord.from_json(
        {"status": "imported", "source": {"path": "/home/me/SmolLM2.gguf", "verified": True}}
    )
    assert "SmolLM2.gguf" in origins(imported)[0]
    assert origins(RunRecord.from_json({})) == []


def test_patterns_and_probabilities_are_thousandths_of_those_of_the_analyses(inspection: Inspection) -> None:
    text, lens = page_data(inspection, str)["texts"][0], inspection.texts[0].lens
    patterns = inspection.texts[0].attention.patterns
    for layer, head, row in np.ndindex(*patterns.shape[:3]):
        shown = text["patterns"][layer][head][row]
        assert shown == pytest.approx(patterns[layer, head, row, : row + 1] * 1000, abs=0.5001)
    assert np.array(text["lens"]["probabilities"]) == pytest.approx(lens.top_probabilities * 1000, abs=0.5001)
    assert text["lens"]["tokens"] == lens.top_tokens.tolist()
    assert text["lens"]["stages"] == ["embed", "L0", "L1"]


def test_candidates_are_the_most_probable_tokens_and_that_of_the_text(inspection: Inspection) -> None:
    data = page_data(inspection, lambda token: f"t{token}")
    words, lens = data["texts"][0]["words"], inspection.texts[0].lens
    best = [lens.top_tokens[-1, :, rank].tolist() for rank in range(CANDIDATES)]
    assert [word["tokens"] for word in words] == [*best, [*TOKENS[1:], lens.top_tokens[-1, -1, 0]]]
    assert data["labels"] == {token: f"t{token}" for token in data["labels"]}
    assert {*TOKENS, *(token for word in words for token in word["tokens"])} <= set(data["labels"])


def test_the_shown_parts_sum_to_the_shown_logit(inspection: Inspection) -> None:
    text = page_data(inspection, str)["texts"][0]
    assert text["parts"] == ["embed", "position", "L0H0", "L0H1", "L0 MLP", "L1H0", "L1H1", "L1 MLP"]
    for word in text["words"]:
        for added, logit, sources in zip(word["added"], word["logits"], word["sources"], strict=True):
            assert sum(added) == pytest.approx(logit, abs=0.005 * (len(added) + 1))
            heads = sum(value for name, value in zip(text["parts"], added, strict=True) if "H" in name)
            assert sum(sources) == pytest.approx(heads, abs=0.005 * (len(sources) + 5))


def test_neurons_show_their_peak(inspection: Inspection) -> None:
    found = inspection.neurons
    assert found is not None
    layers = page_data(inspection, str)["neurons"]["layers"]
    for layer, row in np.ndindex(*found.neurons.shape):
        for rank, example in enumerate(layers[layer][row]["examples"]):
            position = found.positions[layer, row, rank]
            assert example["tokens"][example["peak"]] == found.tokens[found.windows[layer, row, rank], position]
            # The first token of a window is shown, but never counts.
            counted = example["shades"][1:] if position == example["peak"] else example["shades"]
            assert max(map(abs, counted)) == abs(example["shades"][example["peak"]]) <= 100


def test_the_page_loads_nothing_and_no_text_breaks_out(inspection: Inspection, trained_run: Run) -> None:
    page = page_of(inspection, trained_run, read_history(trained_run.metrics_path))
    assert page.startswith("<!doctype html>")
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", page)
    assert page.count("</script>") == page.count("<script") == 2
    assert not re.search("\u2028|run_<i>|<b>windows|of <i>", page)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert data[1].isascii()
    assert not set("<>&'") & set(data[1])
    assert json.loads(data[1])["labels"]["0"] == hostile(0)


def test_receipts_are_listed_with_their_result(inspection: Inspection, trained_run: Run) -> None:
    receipts = [receipt for _, result in inspection.results() for receipt in result.receipts]
    page = page_of(inspection, trained_run)
    assert f"All {len(receipts)} checks passed." in page
    names, *shown = rows(page, "receipts")
    assert names == ["analysis", "check", "error", "tolerance", "result"]
    assert [row[2] for row in shown] == [f"{receipt.error:.0e}" for receipt in receipts]
    first = replace(inspection.summary.receipts[0], error=math.nan)
    broken = replace(inspection, summary=replace(inspection.summary, receipts=(first,)))
    assert re.search(r"1 of \d+ checks FAILED", page_of(broken, trained_run))


def test_without_validation_text(trained_run: Run) -> None:
    inspection = inspect_model(trained_run.load_model(), [Text(TOKENS, "a test")], REPEATED)
    page = page_of(inspection, trained_run)
    assert "ablation" not in rows(page, "heads")[0]
    assert '"neurons":null' in page
    assert "no recorded losses" in page


def test_the_head_table_has_every_score_and_the_uniform_head(inspection: Inspection, trained_run: Run) -> None:
    assert inspection.ablation is not None
    scores = np.arange(20.0).reshape(2, 2, 5) / 40
    heads = replace(inspection.heads, text_scores=scores, text_uniform=np.full(5, 0.037), text_repeats=6)
    names, *shown, uniform = rows(page_of(replace(inspection, heads=heads), trained_run), "heads")
    assert names == ["head", *heads.score_names, "induction on text", "copying", "ablation", "role"]
    for number, (layer, head) in enumerate(np.ndindex(2, 2)):
        values = [f"{value:.1%}".replace("nan%", "–") for value in heads.scores[layer, head]]
        change = f"{inspection.ablation.changes[number]:+.3f}".replace("-", "−")
        assert shown[number][: len(values) + 2] == [f"L{layer}H{head}", *values, f"{scores[layer, head, 4]:.1%}"]
        assert shown[number][-2] == change
    assert uniform[-5:-3] == [f"{heads.uniform[-1]:.1%}", "3.7%"]
    assert "induction on text" not in rows(page_of(inspection, trained_run), "heads")[0]


def test_gains_state_their_text_and_their_uncertainty(trained_run: Run) -> None:
    model, windows = trained_run.load_model(), torch.tensor([[0, *range(10, 18), *range(11, 19)], [0, *range(20, 36)]])
    found = score_heads(model, REPEATED.repeat(3, 1), text_windows(windows, np.array([0, 1])))
    gaps = {"repeat_gap": np.array(-0.5), "repeat_gap_error": np.array(0.1)}
    text = {"text_gap": np.array(2.0), "text_gap_error": np.array(0.1), "text_documents": 30, "text_repeats": 6}
    random, names = repeat_gains(replace(found, **gaps, **text))
    assert re.search("Random tokens .* not easier", random)
    assert re.search("validation split .6 repeats in 30 documents. are easier", names)
    few = repeat_gains(replace(found, **gaps, **{**text, "text_documents": 2, "text_gap_error": np.array(0.2)}))[1]
    assert "in 2 documents) are not easier" in few, "12.7 standard errors of two documents are more than the gap"
    assert not any("Names" in words for words in repeat_gains(score_heads(model, REPEATED)))


def test_the_loss_chart_spans_its_plot() -> None:
    point = Point(step=10, tokens=100, time=1.0, loss=4.5)
    chart = loss_chart(History((point._replace(step=0, loss=8.0), point), (point._replace(loss=4.25),)))
    assert chart is not None
    assert "4.250, at step 10" in chart["best"]
    assert chart["curves"]["training"] == "M44.00 20.00L708.00 233.50", "from the corner down to 4.5 of 4 to 8"
    assert chart["grid"][0] == (264, 4)


def test_tokens_for_the_map(trained_run: Run) -> None:
    model = trained_run.load_model()
    counts = np.zeros(model.vocab_size, dtype=int)
    counts[[0, 7, 50, 9]] = [100, 5, 20, 1]
    assert frequent_tokens(range(3, model.vocab_size), counts) == [50, 7, 9]
    assert frequent_tokens(range(3, 6), None) == [3, 4, 5]


def test_rounded() -> None:
    assert rounded(np.array([[0.1234, math.nan], [2.0, math.inf]]), 2) == [[0.12, None], [2, None]]
    assert thousandths([0.5, math.nan, 0.0004]) == [500, None, 0]


def test_the_pure_functions_of_the_page_in_node() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    unit_tests = (Path(__file__).parent / "page/core_test.js").read_text(encoding="utf-8")
    script = asset("core.js") + unit_tests + "console.log(JSON.stringify(run()));"
    result = subprocess.run([node, "-e", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
