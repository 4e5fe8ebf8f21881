"""Encoded corpora: contents of the cache, when it is rebuilt, and errors."""

import hashlib
import json
import os
import shutil
import threading
import time
import unicodedata
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumiere.config.loader import validate
from lumiere.config.schema import RunConfig
from lumiere.data import checksums, dataset, encoding
from lumiere.data import text as text_module
from lumiere.data.corpus import Corpus, row_reader
from lumiere.data.dataset import (
    UNFINISHED,
    Progress,
    SplitFacts,
    cache_dir,
    document_sizes,
    measure,
    tokenize_corpus,
    tokenize_parts,
    tokenize_text,
)
from lumiere.data.tokenizer import EOT, SOT, Tokenizer
from lumiere.errors import DataError, LumiereError

DOCUMENTS = {"train": ["low lower\nlowest ﬁn\n", "東京 low"], "validation": ["low½"], "test": ["e\u0301\n\n"]}


Give = Callable[[dict[str, list[str]]], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache per test; `folders` lists what was built."""
    monkeypatch.setenv("LUMIERE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Give:
    """Return a function that replaces the corpus of the config with its argument."""

    def give(documents: dict[str, list[str]]) -> None:
        readers = {split: row_reader(texts, None) for split, texts in documents.items()}
        fingerprint = hashlib.sha256(repr(documents).encode()).hexdigest()
        counts = {split: len(texts) for split, texts in documents.items()}
        monkeypatch.setattr(dataset, "load_corpus", lambda config: Corpus(readers, fingerprint, counts))

    return give


@pytest.fixture
def given_documents(give: Give) -> None:
    give(DOCUMENTS)


def config_of(**tokenizer: Any) -> RunConfig:
    return validate({"tokenizer": {"vocab_size": 300} | tokenizer, "dataset": {"num_documents": 4}})


def folders(cache: Path) -> list[Path]:
    """Return all corpora in the cache, including unfinished ones."""
    return sorted((cache / "corpora").iterdir()) if cache.is_dir() else []


# What is on disk


@pytest.mark.usefixtures("given_documents")
def test_ids_are_all_documents_concatenated() -> None:
    corpus = tokenize_corpus(config_of())
    assert list(corpus.splits) == ["train", "validation", "test"]
    for split, documents in DOCUMENTS.items():
        ids, offsets = corpus.splits[split].ids, corpus.splits[split].offsets
        expected = [[SOT, *corpus.tokenizer.encode(text), EOT] for text in documents]
        assert ids.tolist() == list(chain(*expected))
        assert offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
        assert ids.dtype == np.uint16
        texts = [corpus.tokenizer.decode(ids[a:b].tolist()) for a, b in pairwise(offsets)]
        assert texts == [unicodedata.normalize("NFKC", text) for text in documents]


@pytest.mark.usefixtures("given_documents")
def test_facts_by_hand() -> None:
    corpus = tokenize_corpus(config_of())
    train, test = corpus.splits["train"].facts, corpus.splits["test"].facts
    assert (train.num_documents, train.num_tokens) == (2, len(corpus.splits["train"].ids))
    # "low lower\n" 10, "lowest ﬁn\n" 7 + 3 + 2 (ﬁ is one character of three bytes); "東京 low" 6 + 4.
    assert train.num_bytes == 10 + 12 + 10
    # low lower ↵ lowest ﬁn ↵ · 東京 low
    assert train.num_words == 6 + 2
    assert train.num_targets == train.num_tokens - 2
    # Before NFKC: e and its accent are three bytes, not the two of é. Two line ends and a word.
    assert (test.num_bytes, test.num_words) == (5, 3)
    assert test.sha256 == hashlib.sha256("e\u0301\n\n\0".encode()).hexdigest()
    assert measure(" a  b\u00a0c\t\n") == (10, 4)


def test_the_tokenizer_learns_from_training_documents_only(give: Give) -> None:
    give({"train": ["aaaa aaaa"], "validation": ["bbbb bbbb bbbb"]})
    tokenizer = tokenize_corpus(config_of()).tokenizer
    assert len(tokenizer.encode("aaaa")) == 1
    assert len(tokenizer.encode("bbbb")) == 4


@pytest.mark.usefixtures("given_documents")
@pytest.mark.parametrize(("num_used", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_large_vocabularies_take_four_bytes(monkeypatch: pytest.MonkeyPatch, num_used: int, dtype: type) -> None:
    small = tokenize_corpus(config_of())
    monkeypatch.setattr(Tokenizer, "__len__", lambda self: num_used)
    large = tokenize_corpus(config_of(vocab_size=100_000))
    assert not large.from_cache
    assert large.splits["train"].ids.dtype == dtype
    assert large.splits["train"].ids.tolist() == small.splits["train"].ids.tolist()


def test_more_documents_than_are_encoded_at_once(give: Give, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_PARTS", 3)
    documents = {"train": [f"low {i}" for i in range(7)], "validation": ["low"]}
    give(documents)
    events: list[Progress] = []
    corpus = tokenize_corpus(config_of(), events.append)
    assert corpus.splits["train"].facts.num_documents == 7
    encoded = ([SOT, *ids, EOT] for ids in corpus.tokenizer.encode_batch(documents["train"]))
    assert corpus.splits["train"].ids.tolist() == list(chain(*encoded))
    assert events == [
        Progress("reading the corpus"),
        Progress("training the tokenizer", num_bytes=35),
        *(Progress("encoding the train split", done, 7, 5 * done) for done in (3, 6, 7)),
        Progress("encoding the validation split", 1, 1, 3),
    ]


def test_windows_of_a_split() -> None:
    config = config_of()
    corpus = tokenize_corpus(config)
    windows = corpus.windows("test", config)
    assert (windows.context_size, windows.sliding_window_size) == (64, 8)
    assert windows.ids is corpus.splits["test"].ids
    with pytest.raises(DataError, match="'tset'"):
        corpus.windows("tset", config)


# The cache


def test_a_corpus_is_encoded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize_corpus(config_of())
    monkeypatch.setattr(Tokenizer, "train", None)
    events: list[Progress] = []
    second = tokenize_corpus(config_of(), events.append)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert events == [Progress("reading the corpus")]
    assert second.fingerprint == first.fingerprint
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    for split in first.splits:
        assert second.splits[split].facts == first.splits[split].facts
        assert np.array_equal(second.splits[split].ids, first.splits[split].ids)
        assert np.array_equal(second.splits[split].offsets, first.splits[split].offsets)
    assert len(folders(cache)) == 1


def test_each_tokenizer_and_corpus_has_its_own_folder(cache: Path) -> None:
    dataset_settings = {"num_documents": 4}
    configs = [
        config_of(),
        config_of(vocab_size=310),
        config_of(min_frequency=10**6),
        config_of(normalizer="none"),
        validate({"tokenizer": {"vocab_size": 300}, "dataset": dataset_settings | {"seed": 1}}),
    ]
    corpora = [tokenize_corpus(config) for config in configs]
    assert not any(corpus.from_cache for corpus in corpora)
    assert len(folders(cache)) == len({corpus.fingerprint for corpus in corpora}) == len(configs)
    # Windows and the model do not affect the cache.
    wide = {"model": {"context_size": 9}, "dataset": dataset_settings | {"sliding_window_size": 1}}
    assert tokenize_corpus(validate(wide | {"tokenizer": {"vocab_size": 300}})).from_cache


def test_the_fingerprint_is_of_the_text(give: Give) -> None:
    give(DOCUMENTS)
    first = tokenize_corpus(config_of())
    give(DOCUMENTS | {"test": ["é\n\n"]})
    second = tokenize_corpus(config_of())
    # Equal ids, since NFKC makes the two one; but not the same text.
    assert second.splits["test"].ids.tolist() == first.splits["test"].ids.tolist()
    assert second.fingerprint != first.fingerprint


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache, to be copied."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMIERE_CACHE_DIR", str(folder))
        tokenize_corpus(config_of())
    return folder


@pytest.fixture
def folder(built: Path, cache: Path) -> Path:
    """The folder of a complete corpus in the test's own cache."""
    shutil.copytree(built, cache)
    return folders(cache)[0]


def facts_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change the facts in `splits.json`."""

    def damage(path: Path) -> None:
        facts = json.loads(path.read_bytes())
        change(facts)
        path.write_text(json.dumps(facts))

    return damage


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


def rewrite(dtype: type, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(np.fromfile(path, dtype)).tobytes())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4 * 2])


DAMAGES: dict[str, list[Callable[[Path], Any]]] = {
    **{
        name: [Path.unlink, lambda path: path.write_bytes(b""), truncate]
        for name in ("tokenizer.json", "train.ids", "validation.offsets")
    },
    "splits.json": [
        Path.unlink,
        truncate,
        *map(text, ("", "[]", "7", '{"train": 7}', "{}", "[" * 9999, " " * 20_000)),
        facts_with(lambda facts: facts.update({"../../outside": facts.pop("test")})),
        *(
            facts_with(lambda facts, field=field, value=value: facts["train"].update({field: value}))
            for field, value in [("num_tokens", 1), ("num_tokens", "9"), ("num_documents", 10**12), ("num_words", 0)]
        ),
    ],
    "checksums.json": [*map(text, ("[]", "{", "7", " " * 20_000))],
    "train.offsets": [
        rewrite(np.int64, lambda offsets: offsets[::-1]),
        rewrite(np.int64, lambda offsets: offsets + 1),
        rewrite(np.int64, lambda offsets: offsets[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ],
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name, own in DAMAGES.items() for damage in own])
def test_a_damaged_cache_is_an_error(folder: Path, name: str, damage: Callable[[Path], Any]) -> None:
    (folder / "checksums.json").unlink()  # they would detect it first
    damage(folder / name)
    with pytest.raises(DataError, match=str(folder)):
        tokenize_corpus(config_of())


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("train.ids", lambda path: path.write_bytes(b"\xff" * path.stat().st_size), "the id 65535"),
        (
            "train.offsets",
            rewrite(np.int64, lambda offsets: offsets[[0, 2, 1, *range(3, len(offsets))]]),
            "a document without a token",
        ),
    ],
)
def test_damage_within_the_files_is_found_when_they_are_read(
    folder: Path, name: str, damage: Callable[[Path], Any], problem: str
) -> None:
    (folder / "checksums.json").unlink()
    damage(folder / name)
    windows = tokenize_corpus(config_of()).windows("train", config_of())
    with pytest.raises(DataError, match=f"{folder}.*{problem}"):
        windows.cut(np.arange(len(windows)))


@pytest.mark.parametrize("name", ["train.ids", "validation.ids", "train.offsets"])
def test_ids_changed_to_other_valid_ones_are_an_error(folder: Path, name: str) -> None:
    path = folder / name
    status = path.stat()
    if name.endswith("ids"):
        rewrite(np.uint16, lambda ids: np.where(ids > 3, ids - 1, ids))(path)
    else:
        rewrite(np.int64, lambda offsets: offsets + (np.arange(len(offsets)) == 1))(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=name):
        tokenize_corpus(config_of())


def test_files_are_read_again_only_if_they_may_have_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    tokenize_corpus(config_of())
    tokenize_corpus(config_of())
    assert len(read) == 12  # files that have just changed may change again within one tick of their times
    monkeypatch.setattr(checksums, "SETTLED_SECONDS", -1e9)
    tokenize_corpus(config_of())
    read.clear()
    tokenize_corpus(config_of())
    assert not read
    tokenize_corpus(config_of(), verify=True)
    assert len(read) == 6
    time.sleep(0.02)
    (folder / "train.ids").touch()
    read.clear()
    tokenize_corpus(config_of())
    assert read == [str(folder / "train.ids")]


def test_verifying_finds_changes_that_preserve_the_times(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "SETTLED_SECONDS", -1e9)
    tokenize_corpus(config_of())
    path = folder / "train.ids"
    rewrite(np.uint16, lambda ids: ids[::-1])(path)
    now = path.stat()
    stamp = [now.st_size, now.st_ino, now.st_dev, now.st_mtime_ns, now.st_ctime_ns]
    for record in (cache / "checksums").iterdir():
        record.write_text(json.dumps(json.loads(record.read_text()) | {"stamp": stamp}))
    assert tokenize_corpus(config_of()).from_cache
    with pytest.raises(DataError, match=r"train\.ids"):
        tokenize_corpus(config_of(), verify=True)


def test_a_cache_of_an_older_version_gets_checksums(folder: Path) -> None:
    whole = (folder / "checksums.json").read_text()
    (folder / "checksums.json").unlink()
    assert tokenize_corpus(config_of()).from_cache
    assert json.loads((folder / "checksums.json").read_text()) == json.loads(whole)


def test_an_interrupted_build_is_resumed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(progress: Progress) -> None:
        if progress.stage == "encoding the validation split":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(config_of(), fail)
    [unfinished] = folders(cache)
    assert unfinished.name.startswith(UNFINISHED)
    monkeypatch.setattr(Tokenizer, "train", None)
    events: list[Progress] = []
    assert not tokenize_corpus(config_of(), events.append).from_cache
    assert [progress.stage for progress in events] == [
        "reading the corpus",
        "encoding the validation split",
        "encoding the test split",
    ]
    [folder] = folders(cache)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["tokenizer.json", "splits.json", "checksums.json"]
        + [f"{split}.{kind}" for split in ("train", "validation", "test") for kind in ("ids", "offsets")]
    )


def test_a_corpus_that_cannot_be_read_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise DataError("broken", "mend it")

    monkeypatch.setattr(dataset, "load_corpus", lambda config: Corpus({"train": fail, "validation": fail}, "broken"))
    with pytest.raises(DataError, match="broken"):
        tokenize_corpus(config_of())
    assert folders(cache) == []


def test_a_second_process_waits_and_reads_what_the_first_built(cache: Path) -> None:
    stages: list[str] = []
    waiting = threading.Event()
    built_by_second: list[bool] = []

    def emit_second(progress: Progress) -> None:
        stages.append(progress.stage)
        if progress.stage.startswith("waiting"):
            waiting.set()

    # A lock of the library holds threads apart as it does processes.
    second = threading.Thread(
        target=lambda: built_by_second.append(not tokenize_corpus(config_of(), emit_second).from_cache)
    )

    def emit_first(progress: Progress) -> None:
        if progress.stage == "encoding the test split":
            second.start()
            assert waiting.wait(timeout=60)

    corpus = tokenize_corpus(config_of(), emit_first)
    second.join()
    assert not corpus.from_cache
    assert built_by_second == [False]
    assert len(stages) == 2
    assert stages[1].startswith("waiting")
    assert len(folders(cache)) == 1


def test_stale_unfinished_corpora_are_removed(cache: Path) -> None:
    forgotten, recent = (cache / "corpora" / f"{UNFINISHED}{name}" for name in ("old", "new"))
    for folder in (forgotten, recent):
        folder.mkdir(parents=True)
        (folder / "train.ids").write_bytes(b"")
    for path in (forgotten / "train.ids", forgotten):
        os.utime(path, (0, 0))
    tokenize_corpus(config_of())
    assert not forgotten.exists()
    assert recent.exists()


def test_location_of_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == cache
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "home" / name))
    # An empty value counts as unset.
    monkeypatch.setenv("LUMIERE_CACHE_DIR", "")
    assert cache_dir() == tmp_path / "home" / "lumiere"
    monkeypatch.delenv("LUMIERE_CACHE_DIR")
    assert cache_dir() == tmp_path / "home" / "lumiere"


def test_a_cache_that_cannot_be_written_is_an_error(cache: Path) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(LumiereError, match=str(cache)) as caught:
        tokenize_corpus(config_of())
    assert "LUMIERE_CACHE_DIR" in (caught.value.hint or "")


# No text


def test_a_split_without_text_is_an_error_or_left_out(give: Give, cache: Path) -> None:
    for split in ("train", "validation"):
        give(DOCUMENTS | {split: []})
        with pytest.raises(DataError, match=f"the {split} split"):
            tokenize_corpus(config_of())
        assert folders(cache) == []
    give(DOCUMENTS | {"test": []})
    assert list(tokenize_corpus(config_of()).splits) == ["train", "validation"]


@pytest.mark.usefixtures("given_documents")
def test_a_single_text() -> None:
    tokenizer = tokenize_corpus(config_of()).tokenizer
    split = tokenize_text("low ﬁ\n", tokenizer)
    ids = [SOT, *tokenizer.encode("low fi\n"), EOT]
    assert split.ids.tolist() == ids
    assert split.offsets.tolist() == [0, len(ids)]
    assert split.facts == SplitFacts(1, len(ids), 8, 3, hashlib.sha256("low ﬁ\n\0".encode()).hexdigest(), 7)
    assert len(split.windows(64, 8)) == 1
    with pytest.raises(DataError, match="empty"):
        tokenize_text(" \n", tokenizer)
    with pytest.raises(LumiereError, match="surrogate"):
        tokenize_text("\ud800", tokenizer)


@pytest.mark.usefixtures("given_documents")
def test_a_cache_of_a_version_without_normalized_bytes_is_read(cache: Path) -> None:
    before = tokenize_corpus(config_of())
    [folder] = folders(cache)
    path = folder / "splits.json"
    facts = json.loads(path.read_text())
    assert {split: fields.pop("num_normalized_bytes") for split, fields in facts.items()} == {
        split: sum(len(unicodedata.normalize("NFKC", text).encode()) for text in texts)
        for split, texts in DOCUMENTS.items()
    }
    path.write_text(json.dumps(facts))
    (folder / "checksums.json").unlink()
    after = tokenize_corpus(config_of())
    assert after.from_cache
    assert after.fingerprint == before.fingerprint
    assert after.splits["train"].facts == before.splits["train"].facts


@pytest.mark.usefixtures("given_documents")
def test_the_name_of_a_cached_corpus_is_that_of_versions_without_a_normalizer(cache: Path) -> None:
    config = config_of()
    tokenize_corpus(config)
    settings = {"min_frequency": 2, "sample_bytes": 100_000_000, "vocab_size": 300}
    identity = json.dumps([2, hashlib.sha256(repr(DOCUMENTS).encode()).hexdigest(), settings], sort_keys=True)
    assert [folder.name for folder in folders(cache)] == [hashlib.sha256(identity.encode()).hexdigest()[:32]]


def test_sizes_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["plain", "x² ＡＢ\n", "e\u0301 …", "one two " * 40]
    tokenizer = Tokenizer.train(["plain one two"], 300, 1)
    whole = tokenize_parts(row_reader(texts, None)(), tokenizer)
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 7)
    monkeypatch.setattr(dataset, "IDS_AT_ONCE", 5)
    read = row_reader(texts, None)
    split = tokenize_parts(read(), tokenizer)
    assert split.ids.tolist() == whole.ids.tolist()
    assert split.offsets.tolist() == whole.offsets.tolist()
    assert split.facts == whole.facts
    sizes = document_sizes(read(), split, tokenizer)
    normalized = [unicodedata.normalize("NFKC", text) for text in texts]
    assert sizes.num_bytes.tolist() == [len(text.encode()) for text in texts]
    assert sizes.num_normalized_bytes.tolist() == [len(text.encode()) for text in normalized]
    assert sizes.num_changed_bytes.tolist() == [0, 2 + 6, 3 + 3, 0]
    assert sizes.num_words.tolist() == [1, 3, 2, 80]
    with pytest.raises(DataError, match="has changed"):
        document_sizes(row_reader(texts[:3], None)(), split, tokenizer)
