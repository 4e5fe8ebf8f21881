"""The model card: true to its run, valid on the Hub, and safe from whatever stands in files."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lumiere.config.loader import load_config, validate
from lumiere.config.schema import RunConfig
from lumiere.data.corpus import BUILT_IN
from lumiere.evaluation.loss import Evaluation
from lumiere.models.transformer import Transformer
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from lumiere.report.model_card import BUILT_IN as BUILT_IN_CARDS
from lumiere.report.model_card import (
    SECTIONS,
    CardFacts,
    card_checkpoint,
    corpus_name,
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


@pytest.fixture
def card_facts() -> CardFacts:
    """A run of the Lumiére model card's config."""
    return CardFacts(
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


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def headings(card: str) -> list[str]:
    """The headings that a reader of CommonMark with tables finds below the header."""
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def test_the_card_of_a_fixed_run_is_the_golden_one(card_facts: CardFacts, golden) -> None:
    card = model_card(card_facts)
    assert card == golden("card.md", card)
    assert headings(card) == ["Lumiere hiq6ihsb", *SECTIONS]


def test_the_hub_reads_its_header(card_facts: CardFacts) -> None:
    data = ModelCard(model_card(card_facts)).data
    header = data.to_dict()
    assert [header[key] for key in ("license", "library_name", "pipeline_tag")] == ["mit", "lumiere", "text-generation"]
    assert data.language == ["en"]
    assert data.datasets == ["Salesforce/wikitext"]
    assert data.model_name == card_facts.run_name
    results = {result.metric_type: result for result in data.eval_results}
    assert results["mean_batch_loss"].metric_value == 4.418
    assert results["mean_batch_perplexity"].metric_value == 85.01
    assert results["loss"].metric_value == 4.4
    first = results["loss"]
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "validation",
    )


def test_what_is_not_known_is_not_claimed(card_facts: CardFacts) -> None:
    own = changed(card_facts.config, dataset={"name": "text", "subset": None, "data_files": "/home/me/secret/book.txt"})
    card = model_card(dataclasses.replace(card_facts, config=own, on_hub=False))
    data = ModelCard(card).data
    assert data.language is None
    assert data.datasets is None
    assert "English" not in card
    assert "`book.txt`" in card
    assert "/home" not in card


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Salesforce/wikitext", "Salesforce/wikitext"),
        ("/home/me/data/wikitext/", "wikitext"),
        ("../wikitext", "wikitext"),
        ("C:\\Users\\me\\wikitext", "wikitext"),
        ("..", ".."),
    ],
)
def test_a_path_is_not_told(card_facts: CardFacts, name: str, shown: str) -> None:
    assert corpus_name(changed(card_facts.config, dataset={"name": name}).dataset) == shown


IMPROVEMENTS = {
    "Rotary": {"model": {"positions": "rotary"}},
    "starts at zero": {"model": {"zero_output_init": True}},
    "Muon": {"training": {"optimizer": "muon"}},
    "exponential moving average": {"training": {"ema_decay": 0.99}},
    "cut at other places": {"training": {"random_window_offset": True}},
}


@pytest.mark.parametrize("words", IMPROVEMENTS)
def test_only_what_the_config_has_is_an_improvement(card_facts: CardFacts, words: str) -> None:
    assert words not in section(model_card(card_facts), "Improvements over a plain transformer")
    config = changed(card_facts.config, **IMPROVEMENTS[words])
    assert words in section(
        model_card(dataclasses.replace(card_facts, config=config)), "Improvements over a plain transformer"
    )


def test_parameters_are_those_of_the_model(card_facts: CardFacts) -> None:
    table = section(model_card(card_facts), "Parameters")
    counts = [int(number.replace(",", "")) for number in re.findall(r"\| ([\d,]+) \|", table)]
    assert counts[-1] == 1_188_992
    assert sum(counts[:-1]) == counts[-1]


@pytest.mark.parametrize(
    ("subset", "words", "others"),
    [("wikitext-2-v1", "rare words are replaced", "raw text (`"), ("wikitext-2-raw-v1", "raw text (`", "rare words")],
)
def test_limitations_tell_the_two_wikitexts_apart(card_facts: CardFacts, subset: str, words: str, others: str) -> None:
    config = changed(card_facts.config, dataset={"subset": subset})
    limits = section(model_card(dataclasses.replace(card_facts, config=config)), "Limitations")
    assert words in limits
    assert others not in limits
    # 64 tokens of 10,940,000 bytes in 3,080,000 tokens are 227.3 bytes.
    assert "64 tokens at once, about 227 bytes" in limits


@pytest.mark.parametrize(("name", "words"), [("stories", "from a grammar"), ("chains", "are no language")])
def test_a_built_in_corpus_is_nobody_elses(card_facts: CardFacts, name: str, words: str) -> None:
    dataset = {"name": name, "subset": None, "document_start": None}
    config = changed(card_facts.config, dataset=dataset)
    card = model_card(dataclasses.replace(card_facts, config=config, on_hub=False))
    assert words in section(card, "Limitations")
    assert "is made by Lumiere and has no other licence" in card
    assert "a licence of its own" not in card
    assert "on the trainer's machine" not in card


def test_every_built_in_corpus_has_words_for_a_card() -> None:
    assert set(BUILT_IN_CARDS) == set(BUILT_IN)


def test_limitations_tell_of_a_training_without_an_end(card_facts: CardFacts) -> None:
    short = dataclasses.replace(card_facts, status="interrupted", record=RunRecord.from_json(RECORD | {"epoch": 0.25}))
    limits = section(model_card(short), "Limitations")
    assert "its status was `interrupted`" in limits
    assert "25% of the training windows" in limits


def test_text_from_files_breaks_nothing(card_facts: CardFacts) -> None:
    dataset = {
        "name": NASTY,
        "subset": NASTY,
        "data_files": [NASTY],
        "text_column": NASTY,
        "document_start": "|`\n---\n|",
    }
    config = changed(card_facts.config, dataset=dataset)
    record = RECORD | {
        "device": NASTY,
        "precision": NASTY,
        "corpus_sha256": NASTY,
        "versions": {"lumiere": NASTY, "torch": NASTY},
    }
    facts = dataclasses.replace(
        card_facts, config=config, record=RunRecord.from_json(record), status=NASTY, on_hub=False
    )
    card = model_card(facts)
    assert headings(card) == ["Lumiere hiq6ihsb", *SECTIONS]
    assert all(line.isprintable() for line in card.splitlines())
    data = ModelCard(card).data
    assert data.to_dict()["library_name"] == "lumiere"
    assert data.eval_results[0].dataset_config.startswith("x|y `z` ``q``\\n---")
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(card).text)
    assert "<script>" not in html
    # Every row of a table has as many cells as its head, so nothing was cut off.
    for table in re.findall(r"<table>.*?</table>", html, flags=re.DOTALL):
        widths = {len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", table, flags=re.DOTALL)}
        assert len(widths) == 1
        assert "<td></td>" not in table.partition("<tbody>")[2]
    assert "x|y `z` ``q``\\n---\\n# Heading\\n&lt;script&gt;$(id)" in html


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(damaged=st.dictionaries(st.sampled_from([*RECORD, "best_evaluation"]), json_values), split=json_values)
def test_a_damaged_record_crashes_nothing(damaged: dict[str, Any], split: Any) -> None:
    for record in (
        RECORD | damaged,
        RECORD | {"splits": {"train": split, "validation": COUNTS | {"num_tokens": split}}},
    ):
        recorded = RunRecord.from_json(record)
        kept_evaluation(recorded, 5)
        facts = CardFacts(
            "run_hiq6ihsb_20250819_001808",
            recorded.status,
            load_config("tiny"),
            recorded,
            "best",
            5,
            SCORES,
            9,
            False,
        )
        assert headings(model_card(facts)) == ["Lumiere hiq6ihsb", *SECTIONS]


@given(name=st.sampled_from([field.name for field in dataclasses.fields(Evaluation)]), value=json_values)
def test_a_kept_evaluation_is_whole_or_none(name: str, value: Any) -> None:
    kept = json.loads(json.dumps({"step": 5} | dataclasses.asdict(SCORES) | {name: value}))
    evaluation = kept_evaluation(RunRecord.from_json({"best_evaluation": kept}), 5)
    if evaluation is not None:
        assert {type(number) for number in dataclasses.astuple(evaluation)} <= {int, float}
        assert f"{getattr(evaluation, name):,.2f}" != "nan"


def test_an_evaluation_of_another_step_is_not_taken() -> None:
    kept = {"step": 5} | dataclasses.asdict(SCORES)
    record = RunRecord(best_evaluation=kept)
    assert kept_evaluation(record, 5) == SCORES
    assert kept_evaluation(record, 6) is None
    assert kept_evaluation(RunRecord(), 5) is None
    kept["word_perplexity"] = None
    assert kept_evaluation(record, 5) == dataclasses.replace(SCORES, word_perplexity=float("inf"))


def test_infinity_is_not_in_the_header(card_facts: CardFacts) -> None:
    facts = dataclasses.replace(card_facts, evaluation=dataclasses.replace(SCORES, word_perplexity=float("inf")))
    assert "word_perplexity" not in [result.metric_type for result in ModelCard(model_card(facts)).data.eval_results]


def test_the_python_of_the_card_runs(trained_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    checkpoint, step = card_checkpoint(trained_run)
    evaluation = kept_evaluation(trained_run.record, step)
    assert evaluation is not None
    assert evaluation.loss == trained_run.record.best_loss
    blocks = re.findall(
        r"```python\n(.*?)```", model_card(gather(trained_run, checkpoint, step, evaluation)), flags=re.DOTALL
    )
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(capsys.readouterr().out) > 20
    assert isinstance(names["model"], Transformer)
    tokens = torch.arange(3, 13)[None]
    assert torch.equal(names["model"].logits(tokens), trained_run.load_model("best").logits(tokens))


def test_the_python_of_a_rotary_card_builds_its_model(card_facts: CardFacts) -> None:
    config = changed(card_facts.config, model={"positions": "rotary"})
    card = model_card(dataclasses.replace(card_facts, config=config))
    (call,) = re.findall(r"Transformer\(.*?\)\n", card, flags=re.DOTALL)
    assert eval(call, {"Transformer": Transformer}).num_parameters == 1_188_992 - 64 * 128


def test_the_citation_is_that_of_citation_cff(card_facts: CardFacts) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = section(model_card(card_facts), "Citation")
    assert f"title = {{{cited['title']}}}" in text
    assert f"author = {{{{{cited['authors'][0]['name']}}}}}" in text
    assert f"license = {{{cited['license']}}}" in text
