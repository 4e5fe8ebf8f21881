"""An interrupted encoding resumes where it stopped; the result is identical, byte for byte."""

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
from lumiere.data.encoding import EMPTY, SplitFacts, encode_split, read_journal
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


def encode(
    folder: Path, tokenizer: Tokenizer, documents: list[str], emit: Callable[[SplitFacts], None] = lambda _: None
) -> SplitFacts:
    folder.mkdir(exist_ok=True)
    return encode_split(folder, "train", row_reader(documents, None), tokenizer, emit)


def encode_until(
    folder: Path, tokenizer: Tokenizer, documents: list[str], is_reached: Callable[[SplitFacts], bool]
) -> None:
    def stop(facts: SplitFacts) -> None:
        if is_reached(facts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(folder, tokenizer, documents, stop)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("last", range(3, 40, 6))
def test_interrupted_anywhere_it_resumes_to_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer, last: int) -> None:
    expected = encode(tmp_path / "whole", tokenizer, DOCUMENTS)
    encode_until(tmp_path / "stopped", tokenizer, DOCUMENTS, lambda facts: facts.num_documents >= last)
    progress: list[int] = []
    resumed = encode(tmp_path / "stopped", tokenizer, DOCUMENTS, lambda facts: progress.append(facts.num_documents))
    assert resumed == expected
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    # Repeats at most the text of one journal entry and a batch.
    assert progress[0] > last - 12
    assert progress == sorted(set(progress))


@pytest.mark.parametrize("last", [100, 400, 900])
def test_it_resumes_within_a_document(
    tmp_path: Path, tokenizer: Tokenizer, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = ["\n".join(DOCUMENTS), "low"]
    whole = encode(tmp_path / "whole", tokenizer, documents)
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 20)
    encode_until(tmp_path / "stopped", tokenizer, documents, lambda facts: facts.num_bytes >= last)
    progress: list[int] = []
    resumed = encode(tmp_path / "stopped", tokenizer, documents, lambda facts: progress.append(facts.num_bytes))
    assert resumed == whole
    assert progress[0] > last - 250
    for name in ("train.ids", "train.offsets"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_complete_split_is_not_read_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    facts = encode(tmp_path, tokenizer, DOCUMENTS)

    def fail() -> Iterator[Part]:
        raise AssertionError

    assert encode_split(tmp_path, "train", fail, tokenizer, lambda _: None) == facts


@pytest.mark.parametrize("lost", [None, "train.ids", "train.offsets"])
def test_changed_documents_or_lost_ids_are_encoded_from_the_start(
    tmp_path: Path, tokenizer: Tokenizer, lost: str | None
) -> None:
    encode_until(tmp_path / "a", tokenizer, DOCUMENTS, lambda facts: facts.num_documents > 30)
    documents = DOCUMENTS if lost else ["another", *DOCUMENTS[1:]]
    if lost:
        (tmp_path / "a" / lost).write_bytes(b"")
    assert encode(tmp_path / "a", tokenizer, documents) == encode(tmp_path / "b", tokenizer, documents)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def journal_of(**facts: Any) -> str:
    counts = dict.fromkeys(["num_documents", "num_tokens", "num_bytes", "num_words", "num_normalized_bytes"], 1)
    return json.dumps({"facts": {**counts, "sha256": "", **facts}, "num_parts": 1, "is_within": False, "done": True})


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"facts": {}, "done": true}', journal_of(num_tokens=-1), journal_of(sha256=7),
     journal_of(num_normalized_bytes=1.5), journal_of().replace('"num_parts": 1', '"num_parts": -1')],
)  # fmt: skip
def test_a_damaged_journal_counts_as_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "whole.journal").write_text(journal_of())
    assert read_journal(tmp_path / "whole.journal").done
    (tmp_path / "a.journal").write_text(text)
    assert read_journal(tmp_path / "a.journal") == EMPTY


def test_a_sample_is_whole_parts() -> None:
    def sample(texts: list[str], num_bytes: int) -> list[str]:
        return list(sample_parts(row_reader(texts, None)(), num_bytes))

    assert sample(["aa", "é", "b", "c"], 4) == ["aa", "é"]
    assert sample(["aa", "é", "b", "c"], 5) == ["aa", "é", "b"]
    assert sample(["aaaa", "b"], 1) == ["aaaa"]
    assert sample(["a"], 100) == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_killed_process_resumes_to_the_same_bytes(tmp_path: Path, streaming: bool) -> None:
    with open(tmp_path / "corpus.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in stories("train", 3000))

    def command(cache: str) -> tuple[list[str], dict[str, str]]:
        # Small batches, each with an entry in the journal, so that there is something to resume.
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

    line, environment = command("whole")
    subprocess.run(line, env=environment, check=True, capture_output=True)
    [whole] = (tmp_path / "whole" / "corpora").iterdir()
    size = (whole / "train.ids").stat().st_size

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
    assert folder.name == whole.name
    assert contents(folder) == contents(whole)
