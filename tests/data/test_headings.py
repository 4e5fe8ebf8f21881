"""Which rows match: as `re` finds it, and an error where it would not come to an end."""

import re
from pathlib import Path

import pytest

from lumiere.config.schema import DatasetConfig
from lumiere.data import corpus as corpora
from lumiere.data.corpus import Matcher, load_corpus
from lumiere.errors import DataError

ENDLESS = "a" * 60 + "!"


@pytest.mark.parametrize("pattern", ["^=[^=]*=$", r"\d", r"(?<!x)(.)\1", "\u2028|é", "^$"])
def test_the_same_rows_match_as_in_this_process(pattern: str) -> None:
    rows = ["", "= A =", "aa", "xaa", "١", "[", "\u2028", "café", "a\ud800a", "\n", '"', "=" * 100_000]
    with Matcher(pattern) as matches:
        for batch in (rows, [], rows[::-1]):
            assert list(matches(batch)) == [re.search(pattern, row) is not None for row in batch]


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(a*)*$", "(.*a){30}$"])
def test_a_pattern_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(corpora, "SECONDS", 0.2)
    with Matcher(pattern) as matches, pytest.raises(DataError, match="document_start"):
        matches(["a", ENDLESS])


@pytest.mark.parametrize("name", ["text", "csv"])
def test_a_corpus_with_such_a_pattern_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(corpora, "SECONDS", 0.2)
    (tmp_path / "book").write_text(f"text\n\n{ENDLESS}\n\n")
    files = str(tmp_path / "book")
    corpus = load_corpus(DatasetConfig(name=name, data_files=files, document_start="(a+)+$"))
    with pytest.raises(DataError, match="document_start"):
        list(corpus.documents("train"))
