"""Tokenizers from elsewhere, against the library that reads them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lumiere.config.loader import validate
from lumiere.config.schema import TokenizerConfig
from lumiere.data import tokenizer_probe
from lumiere.data.dataset import tokenize_corpus
from lumiere.data.encoding import encode_parts, whole_documents
from lumiere.data.foreign_tokenizer import ForeignTokenizer, existing_tokenizer, fitted, load_tokenizer
from lumiere.data.text import Part, parts
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import ConfigError, DataError
from tests.data.foreign import TEXTS, byte_level, never_ending, sentencepiece, unigram

KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "SentencePiece": sentencepiece,
    "Unigram": unigram,
}
SAMPLES = ["Once upon a time, Mia said: hello!", " two  spaces\n\nand lines\t", "日本語 é 🎉 ½"]
SPELLED = "</s> <s> <|endoftext|>"


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.json"
    KINDS[request.param]().save(str(path))
    return path


def opened(path: Path) -> ForeignTokenizer:
    found = existing_tokenizer(TokenizerConfig(path=str(path)))
    assert isinstance(found, ForeignTokenizer)
    return found


def test_ids_and_texts_are_the_librarys(kind: Path) -> None:
    """But for text that spells a special token, which stays text."""
    ours, library = opened(kind), tokenizers.Tokenizer.from_file(str(kind))
    for text in SAMPLES:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == library.decode(ids)
        assert b"".join(map(ours.token_bytes, ids)).decode().strip() == library.decode(ids).strip()
    spelled = set(ours.encode(SPELLED))
    unknown = {token for token, content in ours.special_tokens.items() if content == "<unk>"}
    assert not spelled & ours.special_ids - unknown
    assert len(ours) == library.get_vocab_size()
    assert sorted({*ours.text_ids, *ours.special_ids}) == list(range(len(ours)))


def test_the_start_token_is_what_the_library_adds(kind: Path) -> None:
    ours, library = opened(kind), tokenizers.Tokenizer.from_file(str(kind))
    assert ours.encode("Once", start=True) == library.encode("Once").ids


def test_known_names_end_a_document(kind: Path) -> None:
    assert [opened(kind).label(token) for token in opened(kind).end_ids] in (["<|endoftext|>"], ["</s>"])


def test_settings_beside_it_say_what_surrounds_a_document(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    sentencepiece().save(str(path))
    settings = {
        "bos_token": {"content": "<s>"},
        "add_bos_token": False,
        "eos_token": "</s>",
        "chat_template": "{{ x }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = opened(tmp_path)
    assert (ours.start_id, ours.end_ids) == (None, (2,))
    for name, text in ours.files().items():
        (tmp_path / name).write_text(text)
    again = load_tokenizer(path)
    assert again.fingerprint == ours.fingerprint
    assert (again.start_id, again.end_ids) == (None, (2,))
    assert json.loads(again.files()["tokenizer_config.json"])["chat_template"] == "{{ x }}"
    settings["add_bos_token"] = True
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert opened(path).start_id == 1


def test_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    backend = byte_level()
    expected = backend.encode(TEXTS[0]).ids
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert opened(tmp_path / "tokenizer.json").encode(TEXTS[0]) == expected


@given(st.text(st.sampled_from("aé 日\n.1"), max_size=30), st.text(st.sampled_from("bcé\n ."), min_size=1, max_size=30))
def test_a_gpt_2_tokenizer_may_split_texts(first: str, second: str) -> None:
    ours = opened(GPT_2)
    assert ours.splits_text
    pieces = list(parts([first + " " + second]))
    joined = [token for piece in pieces for token in ours.encode(piece.text)]
    assert joined == (ours.encode(first + " " + second) if pieces else [])


GPT_2 = Path("tokenizer.json")


@pytest.fixture(autouse=True, scope="module")
def gpt_2(tmp_path_factory: pytest.TempPathFactory) -> None:
    global GPT_2
    GPT_2 = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    contents = json.loads(byte_level().to_str())
    contents["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    GPT_2.write_text(json.dumps(contents))


def test_others_get_whole_documents() -> None:
    found = whole_documents([Part("a ", False), Part("b", True), Part("c", True)])
    assert list(found) == [Part("a b", True), Part("c", True)]


def test_documents_have_the_tokenizers_start_and_end(tmp_path: Path) -> None:
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    ours = opened(tmp_path)
    ids, ends = encode_parts([Part("Once", True), Part("upon", True)], False, ours)
    first, second = ([1, *ours.encode(text), 2] for text in ("Once", "upon"))
    assert ids.tolist() == first + second
    assert ends.tolist() == [len(first), len(ids)]


@pytest.mark.parametrize("seconds", [10, 0.01])
def test_a_tokenizer_that_never_ends_is_refused(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the library's own limit where it has one, or else by ours."""
    monkeypatch.setattr(tokenizer_probe, "SECONDS", seconds)
    never_ending().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError):
        opened(tmp_path)


@pytest.mark.slow
def test_memory_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_probe, "MAX_MEMORY", 10**8)
    contents = json.loads(byte_level().to_str())
    contents["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**8}
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(DataError):
        opened(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"decoder": None},
        {"added_tokens": "none"},
        {"pre_tokenizer": {"type": "Unheard"}},
    ],
)
def test_what_cannot_be_used_is_refused(change: dict, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(byte_level().to_str()) | change))
    with pytest.raises(DataError):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "no JSON", '{"model": 3}'])
def test_damaged_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError):
        opened(tmp_path)


def test_a_corpus_in_an_existing_tokenizer(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    values = {"tokenizer": {"path": str(tmp_path)}, "dataset": {"num_documents": 10}}
    config = validate(values)
    tokenizer = existing_tokenizer(config.tokenizer)
    assert fitted(config.tokenizer, tokenizer).vocab_size == 400
    with pytest.raises(ConfigError):
        fitted(validate({"tokenizer": {"path": str(tmp_path), "vocab_size": 399}}).tokenizer, tokenizer)
    corpus = tokenize_corpus(config, tokenizer=tokenizer)
    again = tokenize_corpus(config, tokenizer=tokenizer)
    assert (corpus.from_cache, again.from_cache) == (False, True)
    split = again.splits["train"]
    first = split.ids[: split.offsets[1]].tolist()
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert first[-1] == 0
    assert library.encode(library.decode(first[:-1])).ids == first[:-1]


def test_own_tokenizers_are_used_with_their_own_rules(tmp_path: Path) -> None:
    own = Tokenizer.train(TEXTS, 300, 2)
    (tmp_path / "tokenizer.json").write_text(own.to_json())
    found = existing_tokenizer(TokenizerConfig(path=str(tmp_path)))
    assert type(found) is Tokenizer
    assert found.fingerprint == own.fingerprint
