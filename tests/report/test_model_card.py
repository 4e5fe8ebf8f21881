"""The model card: true to its run, valid on the Hub, and safe from any text in files."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lumiere.config.loader import load_config, validate
from lumiere.config.schema import RunConfig
from lumiere.data.corpus import BUILT_IN
from lumiere.evaluation.loss import Evaluation
from lumiere.models.transformer import Transformer
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from lumiere.report.model_card import (
    CardFacts,
    card_checkpoint,
    corpus_name,
    environment,
    gather,
    kept_evaluation,
    model_card,
)

ROOT = Path(__file__).parents[2]
# The two averages are those that the original reports of its own run.
SCORES = Evaluation(4.4, 81.4509, 4.418, 85.01, 1.7912, 688.5, 315_000, 5_680, 178, 32, 9.5)
COUNTS = {"num_documents": 60, "num_tokens": 322_000, "num_bytes": 1_144_000, "num_words": 217_000, "sha256": "ab"}
RECORD = {
    "status": "finished",
    "device": "cpu",
    "precision": "bfloat16",
    "versions": {"lumiere": "0.1.0", "torch": "2.13.0"},
    "corpus_sha256": "c0ffee",
    "splits": {
        "train": COUNTS | {"num_documents": 600, "num_tokens": 3_080_000, "num_bytes": 10_940_000},
        "validation": COUNTS,
    },
    "step": 20_000,
    "epoch": 11.83,
    "tokens": 37_500_000,
    "training_seconds": 2345.6,
}
NASTY = "x|y `z` ``q``\n---\n# Heading\n<script>$(id)</script>\x1b[31m ]]"


FACTS = CardFacts(  # a run of the original Lumiére model card's config
    run_name="run_hiq6ihsb_20250819_001808",
    status="finished",
    config=load_config("small"),
    record=RunRecord.from_json(RECORD),
    checkpoint="best",
    step=18_590,
    evaluation=SCORES,
    num_tokens_used=4096,
    on_hub=True,
)


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """The config with other values, by section."""
    return validate({name: section | changes.get(name, {}) for name, section in config.model_dump().items()})


def card(facts: dict[str, Any] | None = None, **config: Any) -> str:
    """The card of the fixed run with other facts, and other values in sections of its config."""
    return model_card(dataclasses.replace(FACTS, config=changed(FACTS.config, **config), **(facts or {})))


def header(text: str) -> Any:
    return ModelCard(text).data


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def headings(text: str) -> list[str]:
    """The headings that a reader of CommonMark with tables finds below the header."""
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


HEADINGS = headings((ROOT / "tests/golden/card.md").read_text(encoding="utf-8"))


def test_the_card_of_a_fixed_run_is_the_golden_one(golden: Any) -> None:
    text = card()
    assert text == golden("card.md", text)
    assert len(HEADINGS) == 15


def test_the_hub_reads_its_header() -> None:
    data = header(card())
    keys = ("license", "library_name", "pipeline_tag")
    assert [data.to_dict()[key] for key in keys] == ["mit", "lumiere", "text-generation"]
    assert (data.language, data.datasets) == (["en"], ["Salesforce/wikitext"])
    assert data.model_name == FACTS.run_name
    results = {result.metric_type: result for result in data.eval_results}
    values = {name: results[name].metric_value for name in ("loss", "mean_batch_loss", "mean_batch_perplexity")}
    assert values == {"loss": 4.4, "mean_batch_loss": 4.418, "mean_batch_perplexity": 85.01}
    first = results["loss"]
    found = (first.dataset_type, first.dataset_config, first.dataset_split)
    assert found == ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")
    infinite = {"evaluation": dataclasses.replace(SCORES, word_perplexity=float("inf"))}
    left = header(card(infinite)).eval_results
    assert {result.metric_type for result in left} == results.keys() - {"word_perplexity"}


def test_a_local_corpus_claims_no_language_and_hides_its_folder() -> None:
    own = {"name": "text", "subset": None, "data_files": "/home/me/secret/book.txt"}
    text = card({"on_hub": False}, dataset=own)
    data = header(text)
    assert (data.language, data.datasets) == (None, None)
    assert "`book.txt`" in text
    assert not re.search("English|/home", text)
    for path in ("/home/me/data/wikitext/", "../wikitext", "C:\\Users\\me\\wikitext"):
        assert corpus_name(changed(FACTS.config, dataset={"name": path}).dataset) == "wikitext"
    for name in ("Salesforce/wikitext", ".."):
        assert corpus_name(changed(FACTS.config, dataset={"name": name}).dataset) == name


@pytest.mark.parametrize(
    ("title", "words", "changes"),
    [
        ("Improvements over a plain transformer", "Rotary", {"model": {"positions": "rotary"}}),
        ("Improvements over a plain transformer", "initialized to zero", {"model": {"zero_output_init": True}}),
        ("Improvements over a plain transformer", "Muon", {"training": {"optimizer": "muon"}}),
        ("Improvements over a plain transformer", "EMA", {"training": {"ema_decay": 0.99}}),
        ("Improvements over a plain transformer", "re-chunked", {"training": {"random_window_offset": True}}),
        ("Limitations", "rare words are replaced", {"dataset": {"subset": "wikitext-2-v1"}}),
        ("Limitations", "by a grammar", {"dataset": {"name": "stories", "subset": None}}),
        ("Limitations", "not a language", {"dataset": {"name": "chains", "subset": None}}),
    ],
)
def test_a_statement_depends_on_the_config(title: str, words: str, changes: Any) -> None:
    assert words not in section(card(), title)
    assert words in section(card(**changes), title)


def test_the_lineage_of_a_fine_tuned_run() -> None:
    assert "trained from scratch" in card()
    first = {"run": "run_aaaaaaaa_20250101_000000", "checkpoint": "best", "step": 9, "dataset": "chains"}
    second = first | {"run": "run_bbbbbbbb_20250101_000000", "step": 1234, "weights_sha256": "c0de", "parent": first}
    text = card({"record": RunRecord.from_json(RECORD | {"parent": second})})
    lines = [line for line in section(text, "Overview").splitlines() if line.startswith("- ")]
    assert "from scratch" not in text.replace("It was not trained from scratch", "")
    assert [re.findall(r"`(.*?)`", line) for line in lines] == [
        ["best", second["run"], "chains", "c0de"],
        ["best", first["run"], "chains"],
    ]
    assert "step 1,234" in lines[0]
    assert "trained on the training split" not in section(text, "Tokenization")
    assert headings(text) == HEADINGS


def test_limitations_state_the_record() -> None:
    limits = section(card(), "Limitations")
    # 64 tokens of 10,940,000 bytes in 3,080,000 tokens are 227.3 bytes.
    assert "64 tokens at once, about 227 bytes" in limits
    assert "raw text (`wikitext-2-raw-v1`)" in limits
    short = {"status": "interrupted", "record": RunRecord.from_json(RECORD | {"epoch": 0.25})}
    limits = section(card(short), "Limitations")
    assert "`interrupted`" in limits
    assert "25% of the training windows" in limits


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_corpus_is_described(name: str) -> None:
    text = card({"on_hub": False}, dataset={"name": name, "subset": None, "document_start": None})
    assert f"`{name}`: " in section(text, "Dataset")
    assert "is generated by Lumiere and has no license" in section(text, "License")
    assert "a local dataset" not in text


def test_text_from_files_breaks_nothing() -> None:
    names = ("name", "subset", "text_column")
    dataset = dict.fromkeys(names, NASTY) | {"data_files": [NASTY], "document_start": "|`\n---\n|"}
    versions = {"lumiere": NASTY, "torch": NASTY}
    record = RECORD | dict.fromkeys(("device", "precision", "corpus_sha256"), NASTY) | {"versions": versions}
    record |= {"parent": dict.fromkeys(("run", "checkpoint", "step", "dataset", "weights_sha256"), NASTY)}
    text = card({"record": RunRecord.from_json(record), "status": NASTY, "on_hub": False}, dataset=dataset)
    assert headings(text) == HEADINGS
    assert all(line.isprintable() for line in text.splitlines())
    data = header(text)
    assert data.to_dict()["library_name"] == "lumiere"
    assert data.eval_results[0].dataset_config.startswith("x|y `z` ``q``\\n---")
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(text).text)
    assert "<script>" not in html
    # Every row of a table has as many cells as its head, so nothing was cut off.
    for table in re.findall(r"<table>.*?</table>", html, flags=re.DOTALL):
        widths = {len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", table, flags=re.DOTALL)}
        assert len(widths) == 1
        assert "<td></td>" not in table.partition("<tbody>")[2]
    assert "x|y `z` ``q``\\n---\\n# Heading\\n&lt;script&gt;$(id)" in html


@given(name=st.text())
def test_no_name_ends_the_header(name: str) -> None:
    dataset = FACTS.config.dataset.model_copy(update={"name": name, "subset": name + " ---\n---\n" * 20})
    text = model_card(dataclasses.replace(FACTS, config=FACTS.config.model_copy(update={"dataset": dataset})))
    assert header(text).to_dict()["pipeline_tag"] == "text-generation"
    assert headings(text) == HEADINGS


def test_a_value_without_a_filter_is_refused() -> None:
    with pytest.raises(TypeError, match="filter"):
        environment().from_string("{{ value }}").render(value="# heading")
    assert environment().from_string("{{ value|code }}").render(value="# a`b") == "``# a`b``"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(damaged=st.dictionaries(st.sampled_from([*RECORD, "best_evaluation"]), json_values), split=json_values)
def test_a_damaged_record_crashes_nothing(damaged: dict[str, Any], split: Any) -> None:
    counts = {"train": split, "validation": COUNTS | {"num_tokens": split}}
    for record in (RECORD | damaged, RECORD | {"splits": counts}):
        recorded = RunRecord.from_json(record)
        kept_evaluation(recorded, 5)
        facts = dataclasses.replace(FACTS, record=recorded, status=recorded.status)
        assert headings(model_card(facts)) == HEADINGS


@given(name=st.sampled_from([field.name for field in dataclasses.fields(Evaluation)]), value=json_values)
def test_a_kept_evaluation_is_whole_or_none(name: str, value: Any) -> None:
    kept = json.loads(json.dumps({"step": 5} | dataclasses.asdict(SCORES) | {name: value}))
    evaluation = kept_evaluation(RunRecord.from_json({"best_evaluation": kept}), 5)
    if evaluation is not None:
        assert {type(number) for number in dataclasses.astuple(evaluation)} <= {int, float}
        assert f"{getattr(evaluation, name):,.2f}" != "nan"


def test_an_evaluation_of_another_step_is_not_used() -> None:
    kept = {"step": 5} | dataclasses.asdict(SCORES)
    record = RunRecord(best_evaluation=kept)
    assert kept_evaluation(record, 5) == SCORES
    assert kept_evaluation(record, 6) is None
    assert kept_evaluation(RunRecord(), 5) is None
    kept["word_perplexity"] = None
    assert kept_evaluation(record, 5) == dataclasses.replace(SCORES, word_perplexity=float("inf"))


def test_the_python_of_the_card_runs(trained_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    checkpoint, step = card_checkpoint(trained_run)
    evaluation = kept_evaluation(trained_run.record, step)
    assert evaluation is not None
    assert evaluation.loss == trained_run.record.best_loss
    text = model_card(gather(trained_run, checkpoint, step, evaluation))
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(capsys.readouterr().out) > 20
    assert isinstance(names["model"], Transformer)
    tokens = torch.arange(3, 13)[None]
    assert torch.equal(names["model"].logits(tokens), trained_run.load_model("best").logits(tokens))


def test_the_python_of_a_rotary_card_builds_its_model() -> None:
    text = card(model={"positions": "rotary"})
    (call,) = re.findall(r"Transformer\(.*?\)\n", text, flags=re.DOTALL)
    assert eval(call, {"Transformer": Transformer}).num_parameters == 1_188_992 - 64 * 128


def test_the_citation_is_that_of_citation_cff() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = section(card(), "Citation")
    assert f"title = {{{cited['title']}}}" in text
    assert f"author = {{{{{cited['authors'][0]['name']}}}}}" in text
    assert f"license = {{{cited['license']}}}" in text
