"""Windows against documents cut one by one in plain Python, and the counts on real text."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumiere.config.loader import load_config
from lumiere.data.batches import Windows, steps_per_epoch
from lumiere.data.corpus import load_rows
from lumiere.data.dataset import tokenize_corpus
from lumiere.data.tokenizer import EOT, PAD, SOT


def corpus(lengths: list[int]) -> list[list[int]]:
    """Documents with that many tokens between start and end; each token occurs once in the corpus."""
    fresh = iter(range(10, 10_000))
    return [[SOT, *(next(fresh) for _ in range(length)), EOT] for length in lengths]


def windows_of(documents: list[list[int]], context_size: int, sliding_window_size: int) -> Windows:
    ids = np.array([token for document in documents for token in document], dtype=np.uint16)
    offsets = np.cumsum([0, *map(len, documents)])
    return Windows(ids, offsets, context_size, sliding_window_size)


def cut(document: list[int], context_size: int, sliding_window_size: int) -> list[list[int]]:
    """Cut a document as documented: continue from the overlap while there is a new token to predict."""
    windows = [document[: context_size + 1]]
    end = len(windows[0])
    while len(document) - end + sliding_window_size >= 2 and end < len(document):
        start = end - sliding_window_size
        windows.append(document[start : start + context_size + 1])
        end = start + len(windows[-1])
    return windows


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    documents = corpus(draw(st.lists(st.integers(0, 40), min_size=1, max_size=6)))
    context_size = draw(st.integers(1, 20))
    return documents, context_size, draw(st.integers(0, context_size - 1))


@given(cuttings())
def test_windows_equal_those_cut_in_plain_python(cutting: tuple[list[list[int]], int, int]) -> None:
    documents, context_size, sliding_window_size = cutting
    windows = windows_of(*cutting)
    expected = [
        (window, number)
        for number, document in enumerate(documents)
        for window in cut(document, context_size, sliding_window_size)
    ]
    assert len(windows) == len(expected)
    indices = np.arange(len(windows))
    tokens, lengths = windows.cut(indices)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [window + [PAD] * (context_size + 1 - len(window)) for window, _ in expected]
    assert lengths.tolist() == [len(window) for window, _ in expected]
    assert windows.documents(indices).tolist() == [number for _, number in expected]
    assert windows.cut(indices[::-1])[0].tolist() == tokens[::-1].tolist()


@given(cuttings(), st.integers(0, 5), st.sampled_from([1, 3, 2**20]))
def test_padding_share_equals_that_of_the_windows(
    cutting: tuple[list[list[int]], int, int], shift: int, at_once: int
) -> None:
    documents, context_size, sliding_window_size = cutting
    windows = windows_of(documents, context_size, sliding_window_size)
    windows.shifts = shift > 0
    targets = windows.cut(np.arange(len(windows)), shift)[0][:, 1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumiere.data.batches.DOCUMENTS_AT_ONCE", at_once)
        assert windows.padding_share == pytest.approx((targets == PAD).mean(), abs=1e-12)


@pytest.mark.slow
def test_counts_on_wikitext(wikitext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    overrides = [f"dataset.name={wikitext}", "dataset.subset=wikitext-2-v1"]
    config = load_config("small", overrides)
    tokenized = tokenize_corpus(config)
    assert len(tokenized.tokenizer) == 4096
    facts = {split: tokenized.splits[split].facts for split in tokenized.splits}
    assert {split: fact.num_documents for split, fact in facts.items()} == {"train": 600, "validation": 60, "test": 60}
    # Merity et al. 2016, table 1, count the line ends of blank rows too.
    rows, _ = load_rows(config.dataset)
    blank = {split: sum(not row.strip() for row in rows[split]) for split in rows}
    assert {split: fact.num_words + blank[split] for split, fact in facts.items()} == {
        "train": 2_088_628,
        "validation": 217_646,
        "test": 245_569,
    }
    train, validation = tokenized.windows("train", config), tokenized.windows("validation", config)
    assert (len(train), len(validation)) == (53_670, 5_580)
    assert steps_per_epoch(validation, config.training.batch_size) == 175


@given(cuttings(), st.integers(-12, 12).filter(bool))
def test_shifted_windows_stay_within_their_document(cutting: tuple[list[list[int]], int, int], shift: int) -> None:
    documents, context_size, _ = cutting
    windows = windows_of(*cutting)
    indices = np.arange(len(windows))
    tokens, lengths = windows.cut(indices, shift)
    unshifted = windows.cut(indices)[0][:, 0].tolist()
    for number, row, length, first in zip(windows.documents(indices), tokens, lengths, unshifted, strict=True):
        document = documents[number]
        # Full, wherever the document is long enough.
        last = max(0, len(document) - context_size - 1)
        start = min(max(document.index(first) + shift, 0), last)
        expected = document[start : start + context_size + 1]
        assert row.tolist() == expected + [PAD] * (context_size + 1 - len(expected))
        assert length == len(expected)


@given(cuttings().filter(lambda cutting: cutting[1] > 1))
def test_over_all_shifts_every_token_but_the_first_is_predicted(cutting: tuple[list[list[int]], int, int]) -> None:
    """Without an overlap too, where the windows of a single shift leave some out."""
    documents, _, _ = cutting
    windows = windows_of(*cutting)
    indices = np.arange(len(windows))
    numbers = windows.documents(indices)
    predicted: list[set[int]] = [set() for _ in documents]
    for shift in range(-(windows.stride // 2), (windows.stride + 1) // 2):
        tokens, lengths = windows.cut(indices, shift)
        for number, row, length in zip(numbers, tokens, lengths, strict=True):
            predicted[number].update(row[1:length].tolist())
    assert predicted == [set(document[1:]) for document in documents]


@given(cuttings())
def test_counts_in_a_file_are_those_in_memory(cutting: tuple[list[list[int]], int, int]) -> None:
    documents, context_size, sliding_window_size = cutting
    expected = windows_of(documents, context_size, sliding_window_size)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("lumiere.data.batches.DOCUMENTS_AT_ONCE", 2)
        for _ in range(2):  # written, then found
            windows = Windows(
                expected.ids, expected.offsets, context_size, sliding_window_size, path=Path(folder) / "train"
            )
            assert len(windows) == len(expected)
            indices = np.arange(len(windows))
            assert windows.documents(indices).tolist() == expected.documents(indices).tolist()
        files = [path.name for path in Path(folder).iterdir()]
        assert files == ([f"train.windows-{context_size}-{sliding_window_size}"] if len(documents) > 2 else [])


def test_counts_of_another_text_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumiere.data.batches.DOCUMENTS_AT_ONCE", 2)
    (tmp_path / "train.windows-4-0").write_bytes(b"of one document")
    documents = corpus([3, 4, 9])
    expected = windows_of(documents, 4, 0)
    assert len(Windows(expected.ids, expected.offsets, 4, 0, path=tmp_path / "train")) == len(expected)
