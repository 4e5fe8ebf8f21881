"""An encoding that is stopped goes on where it was, and the result is the same, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lumiere.data import encoding, text
from lumiere.data.corpus import row_reader
from lumiere.data.dataset import sample as sample_parts
from lumiere.data.encoding import EMPTY, Journal, SplitFacts, encode_split
from lumiere.data.stories import stories
from lumiere.data.text import Part
from lumiere.data.tokenizer import Tokenizer

DOCUMENTS = [f"low {'lower ' * (i % 5)}\nlowest {i}" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(DOCUMENTS, vocab_size=290, min_frequency=2)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_PARTS", 3)
    monkeypatch.setattr(encoding, "JOURNAL_BYTES", 150)


def encode(folder: Path, tokenizer: Tokenizer, documents: list[str], tell: Callable[[int], None]) -> SplitFacts:
    folder.mkdir(exist_ok=True)
    read = row_reader(documents, None)
    return encode_split(folder, "train", read, tokenizer, lambda facts: tell(facts.num_documents))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ignore(done: int) -> None:
    pass


@pytest.mark.parametrize("last", range(3, 40, 3))
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer, last: int) -> None:
    expected = encode(tmp_path / "undisturbed", tokenizer, DOCUMENTS, ignore)

    def stop(done: int) -> None:
        if done >= last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "stopped", tokenizer, DOCUMENTS, stop)
    told: list[int] = []
    assert encode(tmp_path / "stopped", tokenizer, DOCUMENTS, told.append) == expected
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")
    # It did not begin again: at most the text of one entry of the journal, and a batch, comes twice.
    assert told[0] > last - 12
    assert told == sorted(set(told))


def test_what_is_whole_is_not_read_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    facts = encode(tmp_path, tokenizer, DOCUMENTS, ignore)

    def fail() -> Iterator[Part]:
        raise AssertionError

    assert encode_split(tmp_path, "train", fail, tokenizer, lambda _: None) == facts


def stopped(folder: Path, tokenizer: Tokenizer) -> None:
    def stop(done: int) -> None:
        if done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(folder, tokenizer, DOCUMENTS, stop)


def test_other_documents_are_encoded_from_the_first_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stopped(tmp_path / "a", tokenizer)
    changed = ["another", *DOCUMENTS[1:]]
    assert encode(tmp_path / "a", tokenizer, changed, ignore) == encode(tmp_path / "b", tokenizer, changed, ignore)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("name", ["train.ids", "train.offsets"])
def test_a_file_that_has_lost_something_is_written_from_its_beginning(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    stopped(tmp_path / "a", tokenizer)
    (tmp_path / "a" / name).write_bytes(b"")
    encode(tmp_path / "a", tokenizer, DOCUMENTS, ignore)
    encode(tmp_path / "b", tokenizer, DOCUMENTS, ignore)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def journal_of(**facts: Any) -> str:
    counts = dict.fromkeys(["num_documents", "num_tokens", "num_bytes", "num_words", "num_normalized_bytes"], 1)
    return json.dumps({"facts": {**counts, "sha256": "", **facts}, "num_parts": 1, "is_within": False, "done": True})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"facts": {}, "done": true}',
        journal_of(num_tokens=-1),
        journal_of(sha256=7),
        journal_of(num_documents=-1),
        journal_of(num_normalized_bytes=1.5),
        journal_of().replace('"num_parts": 1', '"num_parts": -1'),
    ],
)
def test_a_journal_that_says_nothing_is_one_of_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.journal").write_text(text)
    assert Journal(tmp_path / "a.journal").read() == (EMPTY, False)


def test_the_beginning_is_whole_documents() -> None:
    def sample(texts: list[str], num_bytes: int) -> list[str]:
        return list(sample_parts(row_reader(texts, None)(), num_bytes))

    assert sample(["aa", "é", "b", "c"], 4) == ["aa", "é"]
    assert sample(["aa", "é", "b", "c"], 5) == ["aa", "é", "b"]
    assert sample(["aaaa", "b"], 1) == ["aaaa"]
    assert sample(["a"], 100) == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_killed_process_goes_on_and_gives_the_same_bytes(tmp_path: Path, streaming: bool) -> None:
    with open(tmp_path / "corpus.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in stories("train", 3000))

    def command(cache: str) -> tuple[list[str], dict[str, str]]:
        # Small batches, each with an entry in the journal, so that there is something to go on from.
        code = (
            "from lumiere.data import encoding; import sys, time; encoding.BATCH_PARTS = 20; "
            "encoding.JOURNAL_BYTES = 1; from lumiere.cli import main; sys.argv = ['lumiere', *sys.argv[1:]]; main()"
        )
        settings = [
            "dataset.name=json",
            f"dataset.data_files={tmp_path / 'corpus.jsonl'}",
            f"dataset.streaming={str(streaming).lower()}",
            "tokenizer.sample_bytes=100000",
        ]
        arguments = ["tokenize", "tiny", *(part for setting in settings for part in ("--set", setting))]
        environment = os.environ | {
            "LUMIERE_CACHE_DIR": str(tmp_path / cache),
            "HF_DATASETS_CACHE": str(tmp_path / "hf"),
        }
        return [sys.executable, "-c", code, *arguments], environment

    line, environment = command("undisturbed")
    subprocess.run(line, env=environment, check=True, capture_output=True)
    [undisturbed] = (tmp_path / "undisturbed" / "corpora").iterdir()
    size = (undisturbed / "train.ids").stat().st_size

    line, environment = command("killed")
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        written = [path.stat().st_size for path in tmp_path.glob("killed/corpora/*/train.ids")]
        if written and written[0] > 0.6 * size:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [unfinished] = (tmp_path / "killed" / "corpora").iterdir()
    journal = json.loads((unfinished / "train.journal").read_text())
    assert 0 < journal["facts"]["num_documents"] < 2850
    assert not journal["done"]

    subprocess.run(line, env=environment, check=True, capture_output=True)
    [folder] = (tmp_path / "killed" / "corpora").iterdir()
    assert folder.name == undisturbed.name
    assert contents(folder) == contents(undisturbed)


@pytest.mark.parametrize("last", [100, 400, 900])
def test_an_encoding_goes_on_within_a_document(
    tmp_path: Path, tokenizer: Tokenizer, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(tmp_path / "whole", tokenizer, ["\n".join(DOCUMENTS), "low"], ignore)
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 20)
    read = row_reader(["\n".join(DOCUMENTS), "low"], None)
    folder = tmp_path / "stopped"
    folder.mkdir()

    def stop(facts: SplitFacts) -> None:
        if facts.num_bytes >= last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_split(folder, "train", read, tokenizer, stop)
    told: list[int] = []
    assert encode_split(folder, "train", read, tokenizer, lambda facts: told.append(facts.num_bytes)) == whole
    # It did not begin again, though the first document had not ended.
    assert told[0] > last - 250
    for name in ("train.ids", "train.offsets"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
