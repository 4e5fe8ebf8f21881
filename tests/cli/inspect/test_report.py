"""`lumiere inspect report`: the texts of the page, and pages that are equal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lumiere.data.dataset import TokenizedCorpus
from tests.cli.commands import invoke


def data_of(file: str) -> dict[str, Any]:
    (data,) = re.findall(r'id="data">(.*?)</script>', Path(file).read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(data)


def test_the_default_texts() -> None:
    assert invoke("inspect", "report").stdout.startswith("written to report.html, ")
    first, second, repeated = data_of("report.html")["texts"]
    assert first["source"] == "window 0 of the validation split"
    assert re.fullmatch(r"window [1-9]\d* of the validation split", second["source"])
    assert repeated["source"] == "7 random tokens of the training split, twice"
    assert repeated["tokens"][1:8] == repeated["tokens"][8:]


def test_prompts_give_the_same_page_twice(tiny_corpus: TokenizedCorpus) -> None:
    for name in ("a.html", "b.HTML"):
        invoke("inspect", "report", "-p", "One day", "-p", "a cat", "-o", name)
    expected = [[0, *tiny_corpus.tokenizer.encode(prompt)] for prompt in ("One day", "a cat")]
    assert [text["tokens"] for text in data_of("a.html")["texts"]] == expected
    assert Path("a.html").read_bytes() == Path("b.HTML").read_bytes()


@pytest.mark.usefixtures("without_corpus")
def test_without_the_corpus_there_are_random_tokens_and_no_neurons() -> None:
    assert "only random tokens are shown" in invoke("inspect", "report").stderr
    data = data_of("report.html")
    assert [text["source"] for text in data["texts"]] == ["7 random tokens of the vocabulary, twice"]
    assert data["neurons"] is None
