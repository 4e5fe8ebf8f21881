"""Documents: where they start, which are held out, and that none is lost or used twice."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumiere.config.schema import DatasetConfig
from lumiere.data import corpus as corpus_module
from lumiere.data import text as text_module
from lumiere.data.chains import chains
from lumiere.data.corpus import (
    Corpus,
    Reader,
    joined,
    load_corpus,
    matcher,
    row_reader,
    split_validation,
    split_validation_of_stream,
)
from lumiere.data.stories import stories
from lumiere.errors import DataError

FIRST_LEVEL = "^=[^=]*=$"
HEADING, SUB_HEADING = " = A = \n", " = = b = = \n"
ENDLESS = "a" * 60 + "!"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`load_corpus` on given rows instead of those that `datasets` reads."""

    def load(rows: dict[str, list[str]], source: str = "source", **settings: Any) -> Corpus:
        monkeypatch.setattr("lumiere.data.corpus.load_rows", lambda config: (rows, source))
        return load_corpus(DatasetConfig(name="given", **settings))

    return load


def contents(corpus: Corpus) -> dict[str, list[str]]:
    return {split: list(corpus.documents(split)) for split in corpus.splits}


def read(rows: Iterable[str], document_start: str | None = None) -> list[str]:
    return list(joined(row_reader(rows, document_start)()))


def split(
    hold: Callable[[Reader, float, int], dict[str, Reader]], rows: Iterable[str], *how: Any
) -> dict[str, list[str]]:
    return {name: list(joined(part())) for name, part in hold(row_reader(rows, None), *how).items()}


def write(name: str, data: bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data)
    return name


# Where documents begin


def test_a_row_is_a_document() -> None:
    assert read(["one\n", "", " \n", " two"]) == ["one\n", " two"]


@pytest.mark.parametrize(
    ("rows", "documents"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param(["", "\n", " "], [], id="blank rows only"),
        pytest.param(["", HEADING, "", "x\n", ""], [HEADING + "x\n"], id="one"),
        pytest.param(
            ["", HEADING, "", "x\n", "", HEADING, "", "y\n"], [HEADING + "x\n", HEADING + "y\n"], id="two, to the edge"
        ),
        pytest.param([HEADING, "", "x\n", "", HEADING], [HEADING + "x\n", HEADING], id="headings at both edges"),
        pytest.param(["before\n", "", HEADING, "", "x\n"], ["before\n", HEADING + "x\n"], id="rows before the first"),
        pytest.param([HEADING, "", "x\n", " = 1 = \n", "y\n"], [HEADING + "x\n = 1 = \ny\n"], id="within a paragraph"),
        pytest.param(
            [HEADING, "", "x\n", " = 1 = \n", "", "y\n"], [HEADING + "x\n = 1 = \ny\n"], id="ends a paragraph"
        ),
        pytest.param([HEADING, "", " = 1 = \n", "x\n"], [HEADING + " = 1 = \nx\n"], id="begins a paragraph"),
        pytest.param([HEADING, "", SUB_HEADING, "", "x\n"], [HEADING + SUB_HEADING + "x\n"], id="a lower heading"),
        pytest.param([HEADING, "", HEADING, ""], [HEADING, HEADING], id="headings with nothing below"),
        pytest.param(["=A=", "", "x", "y"], ["=A=xy"], id="rows without line ends are joined as they are"),
    ],
)
def test_documents_start_at_headings_that_stand_alone(rows: list[str], documents: list[str]) -> None:
    assert read(rows, FIRST_LEVEL) == documents


@settings(max_examples=25)  # each starts a process
@given(st.lists(st.sampled_from(["", " \n", "x\n", HEADING, SUB_HEADING])))
def test_grouping_loses_no_text(rows: list[str]) -> None:
    documents = read(rows, FIRST_LEVEL)
    assert "".join(documents) == "".join(row for row in rows if row.strip())
    alone = [
        all(not row.strip() for row in rows[max(0, i - 1) : i] + rows[i + 1 : i + 2])
        for i, row in enumerate(rows)
        if row == HEADING
    ]
    # One more where rows stand before the first heading.
    assert sum(alone) <= len(documents) <= sum(alone) + 1
    assert all(document.startswith(HEADING) for document in documents[1:])


@pytest.mark.parametrize("pattern", ["^=[^=]*=$", r"\d", r"(?<!x)(.)\1", "\u2028|é", "^$"])
def test_the_same_rows_match_as_in_this_process(pattern: str) -> None:
    rows = ["", "= A =", "aa", "xaa", "١", "[", "\u2028", "café", "a\ud800a", "\n", '"', "=" * 100_000]
    with matcher(pattern) as find:
        for batch in (rows, [], rows[::-1]):
            assert find(batch) == [re.search(pattern, row) is not None for row in batch]


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(a*)*$", "(.*a){30}$"])
def test_a_pattern_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(corpus_module, "SECONDS", 0.2)
    with matcher(pattern) as find, pytest.raises(DataError, match="document_start"):
        find(["a", ENDLESS])


def test_a_corpus_with_such_a_pattern_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SECONDS", 0.2)
    book = write("book", f"text\n\n{ENDLESS}\n\n".encode())
    corpus = load_corpus(DatasetConfig(name="text", data_files=book, document_start="(a+)+$"))
    with pytest.raises(DataError, match="document_start"):
        list(corpus.documents("train"))


# What is held out


@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 3))
def test_each_document_is_in_one_split_in_order(count: int, fraction: float, seed: int) -> None:
    documents = [f"document {i}" for i in range(count)]
    counted, streamed = (
        split(hold, documents, fraction, seed) for hold in (split_validation, split_validation_of_stream)
    )
    for splits in (counted, streamed):
        assert sorted(splits["train"] + splits["validation"]) == sorted(documents)
        assert splits["train"] == sorted(splits["train"], key=documents.index)
    assert split(split_validation, documents, fraction, seed) == counted
    assert len(counted["validation"]) == min(max(1, round(count * fraction)), count - 1)
    assert documents[0] in streamed["train"]
    assert documents[1] in streamed["validation"]
    # In a stream, the split of a document does not depend on how many follow it.
    longer = split(split_validation_of_stream, [*documents, "one more"], fraction, seed)
    assert set(longer["validation"]) - {"one more"} == set(streamed["validation"])


def test_a_stream_holds_out_its_fraction() -> None:
    texts = list(map(str, range(20_000)))
    held_out = [set(split(split_validation_of_stream, texts, 0.05, seed)["validation"]) for seed in (0, 1)]
    # Four standard deviations of a binomial of 20,000 draws.
    assert all(abs(len(texts) - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5 for texts in held_out)
    assert held_out[0] != held_out[1]


def test_the_seed_determines_what_is_held_out() -> None:
    def held_out(seed: int) -> list[str]:
        return split(split_validation, list(map(str, range(100))), 0.05, seed)["validation"]

    assert len(held_out(0)) == 5
    assert held_out(0) != held_out(1)
    # Drawn from the whole corpus, which may be sorted.
    assert {int(text) // 50 for seed in range(5) for text in held_out(seed)} == {0, 1}


def test_many_documents_are_held_out_like_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "MANY_DOCUMENTS", 50)
    for count, rule in ((50, False), (51, True)):
        texts = list(map(str, range(count)))
        assert (split(split_validation, texts, 0.2, 0) == split(split_validation_of_stream, texts, 0.2, 0)) == rule


@given(st.text(st.sampled_from("ab \n字"), max_size=40), st.floats(0.001, 0.999), st.integers(1, 50))
def test_a_single_document_is_cut_before_a_word(text: str, fraction: float, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PIECE_CHARACTERS", size)
        splits = split(split_validation, [text], fraction, 0)
    end = len(text.rstrip())
    cut = next((i for i in range(int(end * (1 - fraction)), end) if text[i].isspace()), int(end * (1 - fraction)))
    expected = {"train": text[:cut], "validation": text[cut:]}
    assert splits == {name: [side] if side.strip() else [] for name, side in expected.items()}
    assert bool(splits["validation"]) == bool(text.strip())


def test_no_side_of_a_single_document_is_blank(load: Any) -> None:
    # Three fifths of 18 characters end in 'three'.
    splits = contents(load({"train": ["one two three four\n"]}, validation_fraction=0.4))
    assert splits == {"train": ["one two three"], "validation": [" four\n"]}
    for text in ("a", " abc"):
        splits = contents(load({"train": [text]}, validation_fraction=0.99))
        assert splits == {"train": [], "validation": [text]}
    assert contents(load({"train": []})) == {"train": [], "validation": []}


def test_an_existing_validation_split_is_kept(load: Any) -> None:
    rows = {"test": ["t"], "unsupervised": ["u"], "validation": ["v"], "train": ["a", "b", "c"]}
    corpus = load(rows)
    assert corpus.splits == ("train", "validation", "test")
    assert contents(corpus) == {"train": ["a", "b", "c"], "validation": ["v"], "test": ["t"]}
    # Any number of times.
    assert contents(corpus) == contents(corpus)


@pytest.mark.parametrize(
    ("names", "used", "unused"),
    [
        (["train", "valid"], {"train": "train", "validation": "valid"}, ()),
        (["train", "dev", "test"], {"train": "train", "validation": "dev", "test": "test"}, ()),
        (["eval", "Train"], {"train": "Train", "validation": "eval"}, ()),
        (["eval", "validation", "train"], {"train": "train", "validation": "validation"}, ("eval",)),
        (["train", "vaild", "unsupervised"], {"train": "train"}, ("vaild", "unsupervised")),
    ],
)
def test_common_names_of_splits(load: Any, names: list[str], used: dict[str, str], unused: tuple[str, ...]) -> None:
    corpus = load({name: [f"{name} 1", f"{name} 2"] for name in names})
    assert corpus.unused == unused
    found = contents(corpus)
    if "validation" not in used:
        held_out = found.pop("validation")
        assert sorted(held_out + found.pop("train")) == ["train 1", "train 2"]
        used = {}
    assert found == {split: [f"{name} 1", f"{name} 2"] for split, name in used.items()}


def test_num_documents_limits_training_before_anything_is_held_out(load: Any) -> None:
    rows = [str(i) for i in range(100)]
    assert contents(load({"train": rows, "validation": rows}, num_documents=3)) == {
        "train": ["0", "1", "2"],
        "validation": rows,
    }
    splits = contents(load({"train": rows}, num_documents=10, validation_fraction=0.2))
    assert sorted(splits["train"] + splits["validation"]) == rows[:10]
    assert len(splits["validation"]) == 2


def test_no_training_split_is_an_error(load: Any) -> None:
    with pytest.raises(DataError, match="dataset 'given' has no split 'train', it has validation, test"):
        load({"validation": ["v"], "test": ["t"]})


def test_fingerprint_changes_with_everything_that_changes_documents(load: Any) -> None:
    rows = {"train": ["a", "b"]}
    settings: list[dict[str, Any]] = [
        {},
        {"source": "another"},
        {"text_column": "body"},
        {"document_start": "^="},
        {"num_documents": 1},
        {"validation_fraction": 0.1},
        {"seed": 1},
    ]
    assert len({load(rows, **setting).fingerprint for setting in settings}) == len(settings)
    # Windows do not affect the documents.
    assert load(rows, sliding_window_size=0).fingerprint == load(rows).fingerprint


# Built-in corpora


@pytest.mark.parametrize(("name", "generate"), [("stories", stories), ("chains", chains)])
def test_built_in_corpora(name: str, generate: Callable[[str, int, int], Iterable[str]]) -> None:
    corpus = load_corpus(DatasetConfig(name=name, num_documents=40, validation_fraction=0.1, seed=3))
    counts = {"train": 40, "validation": 4, "test": 4}
    assert corpus.counts == counts
    assert contents(corpus) == {split: list(generate(split, count, 3)) for split, count in counts.items()}
    one = load_corpus(DatasetConfig(name=name, num_documents=1))
    assert {split: len(texts) for split, texts in contents(one).items()} == {"train": 1, "validation": 1, "test": 1}


def test_fingerprints_of_built_in_corpora() -> None:
    settings: list[dict[str, Any]] = [
        {}, {"name": "chains"}, {"seed": 1}, {"num_documents": 5}, {"validation_fraction": 0.5}
    ]  # fmt: skip
    assert len({load_corpus(DatasetConfig(**setting)).fingerprint for setting in settings}) == len(settings)


# Real text


def test_wikitext_articles(wikitext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    corpus = load_corpus(DatasetConfig(name=str(wikitext), subset="wikitext-2-v1", document_start=FIRST_LEVEL))
    for split in ("validation", "test"):
        articles = list(corpus.documents(split))
        assert len(articles) == 60
        assert all(article.startswith(" = ") and article.endswith("\n") for article in articles)


# Plain text files


def test_a_file_is_a_document_however_it_is_named() -> None:
    book, letter = write("texts/book.txt", b"\xef\xbb\xbfone\n\ntwo"), write("texts/letter.md", b"dear\r\nyou\r")
    expected = ["one\n\ntwo", "dear\nyou\n"]
    write("texts/blank.txt", b" \r\n")
    for named in ([book, letter], "texts", "texts/*", f"{book}, {letter}"):
        corpus = load_corpus(DatasetConfig(name="text", data_files={"train": named, "validation": book}))
        assert contents(corpus) == {"train": expected, "validation": expected[:1]}
    held_out = load_corpus(DatasetConfig(name="texts"))
    assert sorted(text for texts in contents(held_out).values() for text in texts) == sorted(expected)
    # A file is read twice to be counted, called a stream or not.
    streamed = load_corpus(DatasetConfig(name="texts", streaming=True))
    assert contents(streamed) == contents(held_out)


def test_lines_of_files_are_grouped_into_documents() -> None:
    book = write("book.txt", b"= A =\r\n\r\none\r\ntwo\r\n\r\n= B =\r\n\r\nthree")
    config = DatasetConfig(name="text", data_files={"train": book, "validation": book}, document_start="^=")
    assert contents(load_corpus(config))["train"] == ["= A =\none\ntwo\n", "= B =\nthree"]


@pytest.mark.parametrize("module", ["gzip", "bz2", "lzma"])
def test_compressed_text(module: str) -> None:
    ending = {"gzip": "gz", "bz2": "bz2", "lzma": "xz"}[module]
    data = importlib.import_module(module).compress(b"one\r\ntwo")
    book = write(f"book.txt.{ending}", data)
    splits: dict[str, str | list[str]] = {"train": book, "validation": book}
    assert contents(load_corpus(DatasetConfig(name="text", data_files=splits)))["train"] == ["one\ntwo"]
    write(book, data[:-6])
    with pytest.raises(DataError, match="cannot be read"):
        contents(load_corpus(DatasetConfig(name="text", data_files=splits)))


def test_plain_text_needs_no_datasets_library() -> None:
    write("book.txt", b"one two three four five six seven eight")
    code = (
        "import sys; from lumiere.config.schema import DatasetConfig; from lumiere.data.corpus import load_corpus; "
        "corpus = load_corpus(DatasetConfig(name='text', data_files='book.txt')); "
        "assert list(corpus.parts('train')) and list(corpus.parts('validation')); assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parts_of_a_split_are_those_of_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 20)
    texts = list(stories("train", 12))
    for number, text in enumerate(texts):
        write(f"texts/{number:02}.txt", text.encode())
    corpus = load_corpus(DatasetConfig(name="texts", num_documents=10, validation_fraction=0.3))
    found = contents(corpus)
    assert sorted(found["train"] + found["validation"]) == sorted(texts[:10])
    assert sum(part.is_last for part in corpus.parts("train")) == 7
    assert len(list(corpus.parts("train"))) > 100
