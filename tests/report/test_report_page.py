"""The report page: its numbers beside those of the analyses, and that no text can break out of it."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lumiere.data.batches import batch_at
from lumiere.data.dataset import TokenizedCorpus
from lumiere.interpret.head_scores import head_scores, score_heads
from lumiere.persistence.metrics import History, Point, read_history
from lumiere.persistence.runs import Run
from lumiere.report.report_page import (
    CANDIDATES,
    Inspection,
    Text,
    build_page,
    fill,
    frequent_tokens,
    head_table,
    inspect_model,
    loss_picture,
    page_data,
    receipt_table,
    repeat_gap,
    rounded,
    script_json,
    table,
    thousandths,
)

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
    return f"</script><script>alert({token})</script>\u2028&amp;"


def test_patterns_and_probabilities_are_thousandths_of_those_of_the_analyses(inspection: Inspection) -> None:
    text = page_data(inspection, str)["texts"][0]
    patterns = inspection.texts[0].attention.patterns
    for layer, head, row in np.ndindex(*patterns.shape[:3]):
        shown = text["patterns"][layer][head][row]
        assert shown == pytest.approx(patterns[layer, head, row, : row + 1] * 1000, abs=0.5001)
    lens = inspection.texts[0].lens
    assert np.array(text["lens"]["probabilities"]) == pytest.approx(lens.top_probabilities * 1000, abs=0.5001)
    assert text["lens"]["tokens"] == lens.top_tokens.tolist()
    assert text["lens"]["stages"] == ["embed", "L0", "L1"]


def test_the_words_are_the_best_three_and_that_of_the_text(inspection: Inspection) -> None:
    text = page_data(inspection, str)["texts"][0]
    lens = inspection.texts[0].lens
    assert len(text["words"]) == CANDIDATES + 1
    for rank in range(CANDIDATES):
        assert text["words"][rank]["tokens"] == lens.top_tokens[-1, :, rank].tolist()
    assert text["words"][-1]["tokens"] == [*TOKENS[1:], lens.top_tokens[-1, -1, 0]]


def test_the_shown_parts_sum_to_the_shown_logit(inspection: Inspection) -> None:
    text = page_data(inspection, str)["texts"][0]
    assert text["parts"] == ["embed", "position", "L0H0", "L0H1", "L0 MLP", "L1H0", "L1H1", "L1 MLP"]
    for word in text["words"]:
        for added, logit, sources in zip(word["added"], word["logits"], word["sources"], strict=True):
            assert sum(added) == pytest.approx(logit, abs=0.005 * (len(added) + 1))
            heads = sum(value for name, value in zip(text["parts"], added, strict=True) if "H" in name)
            assert sum(sources) == pytest.approx(heads, abs=0.005 * (len(sources) + 5))


def test_neurons_show_their_peak(inspection: Inspection) -> None:
    data = page_data(inspection, str)["neurons"]
    assert inspection.neurons is not None
    for layer, neurons in enumerate(data["layers"]):
        for row, neuron in enumerate(neurons):
            for rank, example in enumerate(neuron["examples"]):
                window = inspection.neurons.windows[layer, row, rank]
                position = inspection.neurons.positions[layer, row, rank]
                assert example["tokens"][example["peak"]] == inspection.neurons.tokens[window, position]
                # The first token of a window is shown, but never counts.
                counted = example["shades"][1:] if position == example["peak"] else example["shades"]
                assert max(map(abs, counted)) == abs(example["shades"][example["peak"]]) <= 100


def test_every_token_has_its_label(inspection: Inspection) -> None:
    data = page_data(inspection, lambda token: f"t{token}")
    assert set(data["texts"][0]["tokens"]) <= {int(token) for token in data["labels"]}
    assert all(shown == f"t{token}" for token, shown in data["labels"].items())


def test_all_receipts_are_listed(inspection: Inspection) -> None:
    shown = receipt_table(inspection)
    count = sum(len(result.receipts) for _, result in inspection.results())
    assert f"All {count} hold." in shown
    assert shown.count("<tr>") == count + 1


def test_the_page_is_one_file_that_loads_nothing(inspection: Inspection, trained_run: Run) -> None:
    page = build_page(inspection, trained_run.load_config(), read_history(trained_run.metrics_path), hostile, ABOUT)
    assert "{{" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", page)


def test_no_text_breaks_out(inspection: Inspection, trained_run: Run) -> None:
    page = build_page(inspection, trained_run.load_config(), History((), ()), hostile, ABOUT)
    assert page.count("</script>") == page.count("<script") == 2
    assert "\u2028" not in page
    assert "run_<i>" not in page
    assert "<b>windows</b>" not in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["labels"]["0"] == hostile(0)


def test_without_validation_text(trained_run: Run) -> None:
    inspection = inspect_model(trained_run.load_model(), [Text(TOKENS, "a test")], REPEATED)
    page = build_page(inspection, trained_run.load_config(), History((), ()), str, ABOUT)
    assert "loss without it" not in head_table(inspection)
    assert '"neurons":null' in page
    assert "no losses on record" in page


def test_the_heads_stand_beside_the_uniform_one(inspection: Inspection) -> None:
    shown = head_table(inspection)
    assert shown.count("<tr>") == 1 + 4 + 1
    assert inspection.ablation is not None
    for change in inspection.ablation.changes:
        assert f"{change:+.3f}".replace("-", "−") in shown
    for value in inspection.heads.uniform:
        assert f"{value:.1%}" in shown


def test_each_figure_says_which_text_it_is_from(trained_run: Run) -> None:
    """Random tokens that come twice, and names of the validation split, which a model may copy and not the others."""
    model, windows = trained_run.load_model(), torch.tensor([[0, *range(10, 18), *range(11, 19)], [0, *range(20, 36)]])
    found = score_heads(model, REPEATED.repeat(3, 1), (windows, np.array([0, 1])))
    gaps = {"repeat_gap": np.array(-0.5), "repeat_gap_error": np.array(0.1)}
    text = {"text_gap": np.array(2.0), "text_gap_error": np.array(0.1), "text_documents": 30, "text_repeats": 6}
    words = repeat_gap(replace(found, **gaps, **text))
    assert re.search("Random tokens .* not easier", words)
    assert re.search("validation split .6 repeats in 30 documents. are easier", words)
    few = repeat_gap(replace(found, **gaps, **{**text, "text_documents": 2, "text_gap_error": np.array(0.2)}))
    assert "in 2 documents) are not easier" in few, "12.7 standard errors of two documents are more than the gap"
    assert "Names" not in repeat_gap(head_scores(model, REPEATED))


def test_the_scores_on_text_stand_in_the_table(inspection: Inspection) -> None:
    scores = np.arange(20.0).reshape(2, 2, 5) / 40
    on_text = replace(inspection.heads, text_scores=scores, text_uniform=np.full(5, 0.037), text_repeats=6)
    shown = head_table(replace(inspection, heads=on_text))
    assert "induction on text" in shown
    for value in (*scores[..., 4].flatten(), 0.037):
        assert f"{value:.1%}" in shown
    assert "induction on text" not in head_table(inspection)


def test_the_loss_curve_spans_the_picture() -> None:
    point = Point(step=10, tokens=100, time=1.0, loss=4.5)
    shown = loss_picture(History((point._replace(step=1, loss=8.0), point), (point._replace(loss=4.25),)))
    assert "4.250, at step 10" in shown
    coordinates = re.findall(r"points='([^']*)'", shown)
    assert [len(line.split()) for line in coordinates] == [2, 1]


def test_tokens_for_the_map(trained_run: Run) -> None:
    model = trained_run.load_model()
    counts = np.zeros(model.vocab_size, dtype=int)
    counts[[0, 7, 50, 9]] = [100, 5, 20, 1]
    assert frequent_tokens(model, counts) == [50, 7, 9]
    assert frequent_tokens(model, None, num_used=6) == [3, 4, 5]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(np.array([0.1234, math.nan]), [0.12, None]), (2.0, 2), ([[1.005]], [[1.0]]), (math.inf, None)],
)
def test_rounded(value: Any, expected: Any) -> None:
    assert rounded(value, 2) == expected


def test_thousandths() -> None:
    assert thousandths([0.5, math.nan, 0.0004]) == [500, None, 0]


def test_the_json_of_a_script_is_plain() -> None:
    text = script_json({"a": "</script>\u2028\u2029<!--&é"})
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script>\u2028\u2029<!--&é"}


def test_a_value_is_no_template() -> None:
    assert fill("{{a}} {{b}}", {"a": "{{b}}", "b": "x"}) == "{{b}} x"


def test_a_table_escapes_its_cells() -> None:
    assert "&lt;i&gt;" in table(("a", "b"), [("x", "<i>")], "c")
