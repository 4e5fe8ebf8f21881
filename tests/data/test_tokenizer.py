"""The tokenizer: lossless up to normalization, and split identically by other libraries."""

import json
import os
import signal
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lumiere.data import tokenizer as tokenizer_module
from lumiere.data.stories import stories
from lumiere.data.tokenizer import EOT, PAD, SOT, SPECIAL_TOKENS, Tokenizer, byte_characters
from lumiere.errors import DataError, LumiereError
from lumiere.models.transformer import PADDING_ID

TOY = "low low low low low lowest lowest newer newer newer newer newer newer wider wider wider new new"
SAMPLES = [
    "",
    " low lower",
    "Ünïcödé ½ ﬁ 東京\u3000",
    "a\x00b\r\n\t\x1b[31m",
    "👩‍👩‍👧 e\u0301 \u202e",
    "<|sot|>low<|eot|><|pad|>",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
normalize = normalizers.NFKC().normalize_str


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TOY], vocab_size=300, min_frequency=2)


@given(TEXT)
@example("\x00\x1b\u200b\x7f")
@example("e\u0301 \ufb01 \u00bd \U0001f600 \U0010ffff")
@example("<|sot|> <|eot|><|pad|>")
def test_decoding_gives_back_the_normalized_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == normalize(text)
    assert not {SOT, EOT, PAD} & set(tokens)
    # Python's own tables know fewer characters, and agree on those that they know.
    if all(unicodedata.category(character) != "Cn" for character in text):
        assert tokenizer.decode(tokens) == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize(("name", "expected"), [("nfkc", "x2 ... é"), ("nfc", "x² … é"), ("none", "x² … e\u0301")])
def test_the_normalizer_is_a_setting(name: str, expected: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([TOY], 300, 2, name)
    text = "x² … e\u0301"
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalize(text) == expected
    assert sum(tokenizer.token_sizes[token] for token in tokenizer.encode(text)) == len(expected.encode())
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = Tokenizer.load(path)
    assert (loaded.normalizer, loaded.fingerprint) == (name, tokenizer.fingerprint)
    assert loaded.encode(text) == tokenizer.encode(text) == tokenizers.Tokenizer.from_file(str(path)).encode(text).ids


@pytest.mark.parametrize(
    ("text", "nfkc", "nfc"),
    [
        ("", 0, 0),
        ("plain é 字", 0, 0),
        ("ＡＢ", 6, 0),  # three bytes each
        ("x² ½", 2 + 2, 0),
        ("Wait…", 3, 0),
        ("e\u0301a", 1 + 2, 1 + 2),  # the letter and its accent
        ("\u1100\u1161字", 6, 6),  # a syllable of Hangul in its two parts
        ("é\u0301", 0, 0),  # nothing to put together
        ("a\u0301\u0323b", 1 + 4, 1 + 4),  # marks that change places
        ("\u212b", 3, 3),  # the sign for angstrom
    ],
)
def test_bytes_that_the_normalizer_changes(text: str, nfkc: int, nfc: int) -> None:
    changed = [Tokenizer.train([TOY], 300, 2, name).num_bytes_changed(text) for name in ("nfkc", "nfc", "none")]
    assert changed == [nfkc, nfc, 0]


@given(TEXT | st.text("a \u0301\u0323\u1100\u1161\u11a8\uff76\uff9e¨ﬁ字"))
def test_bytes_are_changed_if_and_only_if_the_text_is(tokenizer: Tokenizer, text: str) -> None:
    changed = tokenizer.num_bytes_changed(text)
    assert (changed > 0) == (normalize(text) != text)
    assert changed <= len(text.encode())


@given(st.lists(TEXT, max_size=4))
def test_a_batch_equals_its_texts_encoded_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("text", ["\ud800", "half \udc00 a character"])
def test_half_a_surrogate_pair_is_rejected(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(LumiereError, match="half of a surrogate pair"):
        tokenizer.encode(text)


def test_special_tokens_start_a_text_and_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert (SOT, EOT, PAD) == (0, 1, 2)
    assert PADDING_ID == PAD
    low = tokenizer.encode("low")
    assert tokenizer.encode("low", start=True) == [SOT, *low]
    assert tokenizer.encode("", start=True) == [SOT]
    assert tokenizer.decode([0, *low, 1, 2]) == "low"


def test_merges_of_a_toy_corpus() -> None:
    """The pair ab occurs 7 times and aa 4; with ab merged, a + ab occurs 4 times, and no pair is left."""
    tokenizer = Tokenizer.train(["x"] + ["aab"] * 4 + ["ab"] * 3, vocab_size=400, min_frequency=4)
    assert len(tokenizer) == 3 + 256 + 2
    assert len(Tokenizer.train([TOY], vocab_size=262, min_frequency=2)) == 262
    assert [tokenizer.token_bytes(259), tokenizer.token_bytes(260)] == [b"ab", b"aab"]
    assert tokenizer.encode("aabab") == [260, 259]
    assert [tokenizer.label(token) for token in tokenizer.encode("aaab b")] == ["a", "aab", "·", "b"]


def test_words_of_normal_length_are_learned_whole() -> None:
    texts = [*stories("train", 20), "x" * 1024 + " " + "é" * 511]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, min_frequency=2
    )
    backend.train_from_iterator(texts, trainer)
    expected = json.loads(backend.to_str())["model"]["merges"]
    found = json.loads(Tokenizer.train(texts, 500, 2).to_json())
    assert found["model"]["merges"] == expected
    assert found["pre_tokenizer"]["type"] == "ByteLevel", "longer words are cut while merges are learned only"


def test_a_long_word_is_learned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_LEARNED_BYTES", 4)
    tokenizer = Tokenizer.train(["abcdefgh" * 50], 400, 2)
    learned = {tokenizer.token_bytes(token) for token in range(259, len(tokenizer))}
    assert learned == {b"ab", b"cd", b"ef", b"gh", b"abcd", b"efgh"}
    assert tokenizer.decode(tokenizer.encode("abcdefghab")) == "abcdefghab"


def test_training_reports_progress_and_can_be_interrupted() -> None:
    progress: list[int] = []
    Tokenizer.train(["low é", "lower"], 300, 2, emit=progress.append)
    assert progress[-1] == 6 + 5
    resume = threading.Event()

    def texts() -> Iterator[str]:
        yield "low"
        resume.wait()

    def interrupt(num_bytes: int) -> None:
        signal.raise_signal(signal.SIGINT)

    # A background shell starts its processes with SIGINT ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Tokenizer.train(texts(), 300, 2, emit=interrupt)
    finally:
        signal.signal(signal.SIGINT, previous)
        resume.set()


def test_errors_of_the_texts_are_raised() -> None:
    def texts() -> Iterator[str]:
        yield "low"
        raise DataError("the file is gone")

    with pytest.raises(DataError, match="the file is gone"):
        Tokenizer.train(texts(), 300, 2)


def test_every_token_has_its_bytes(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_bytes(token) for token in (SOT, EOT, PAD, -1, len(tokenizer), 10**9)] == [b""] * 6
    pieces = [tokenizer.token_bytes(token) for token in range(3, len(tokenizer))]
    assert sorted(pieces[:256]) == [bytes([byte]) for byte in range(256)]
    assert all(len(piece) > 1 for piece in pieces[256:])
    assert len(set(pieces)) == len(pieces)
    for token, piece in enumerate(pieces[256:], start=259):
        assert tokenizer.encode(piece.decode()) == [token]


def test_byte_characters_are_those_of_the_library() -> None:
    characters = byte_characters()
    assert sorted(characters) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (characters[ord(" ")], characters[ord("\n")]) == ("Ġ", "Ċ")


def test_invalid_utf_8_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    grin = tokenizer.encode("😀")
    assert [tokenizer.token_bytes(token) for token in grin] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]
    assert tokenizer.decode(grin[:3]) == "\ufffd"
    assert tokenizer.decode([*grin[:2], *tokenizer.encode("a")]) == "\ufffda"


def test_labels_make_every_byte_visible(tokenizer: Tokenizer) -> None:
    labels = {" low": "·low", "\n": "↵", "\t": "⇥", "\r": "␍", "\x1b": "\\x1b", "\x00": "\\x00"}
    labels |= {"é": "\\xc3 \\xa9", "😀": "\\xf0 \\x9f \\x98 \\x80"}
    for text, expected in labels.items():
        assert [tokenizer.label(token) for token in tokenizer.encode(text)] == expected.split()
    whole = Tokenizer.train(["\u200b\u200b"], vocab_size=300, min_frequency=1)
    assert [whole.label(token) for token in whole.encode("\u200b\u200b")] == ["\\u200b\\u200b"]
    every = [tokenizer.label(token) for token in range(len(tokenizer))]
    assert tuple(every[:3]) == SPECIAL_TOKENS
    assert all(label and label.isprintable() and " " not in label for label in every)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str | bytes], Tokenizer]:
    def load(content: str | bytes) -> Tokenizer:
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return Tokenizer.load(path)

    return load


def test_a_loaded_tokenizer_is_the_same_also_in_other_libraries(
    tokenizer: Tokenizer, load: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    loaded = load(tokenizer.to_json())
    assert loaded.fingerprint == tokenizer.fingerprint
    # With the spelled special tokens of SAMPLES: the file does not say that they are ordinary text.
    assert loaded.encode_batch(SAMPLES) == tokenizer.encode_batch(SAMPLES)
    assert loaded.fingerprint != Tokenizer.train([TOY], vocab_size=262, min_frequency=2).fingerprint
    path = str(tmp_path / "tokenizer.json")
    theirs, transformers = tokenizers.Tokenizer.from_file(path), PreTrainedTokenizerFast(tokenizer_file=path)
    for text in SAMPLES[:-1]:
        assert theirs.encode(text).ids == tokenizer.encode(text)
        assert transformers.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == normalize(text)
    assert [transformers.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [SOT, EOT, PAD]


@pytest.mark.parametrize(
    "content",
    [
        *("", '{"a": ', "[" * 10_000, '{"a": NaN}', '{"a": 1, "a": 1}', b"\xff\xfe", "{}", "[]", "7", '{"model": 1}'),
        '{"model": {"vocab": [], "merges": []}}',
        tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str(),
    ],
)
def test_files_that_are_no_tokenizer_of_ours(load: Callable[[str | bytes], Tokenizer], content: str | bytes) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load(content)


@pytest.mark.parametrize("make", [lambda path: None, os.mkfifo, Path.mkdir])
def test_missing_and_special_files_are_errors(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a")
    with pytest.raises(DataError, match=str(tmp_path / "a")):
        Tokenizer.load(tmp_path / "a")


MISSING = object()
CHANGES: dict[str, list[Any]] = {
    # The library would accept each of these and silently split text differently.
    "truncation": [{"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}],
    "padding": [{"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 2, "pad_type_id": 0}],
    "normalizer": [{"type": "NFD"}, {"type": "Lowercase"}, "NFC", MISSING],
    "pre_tokenizer": [{"type": "Split", "pattern": {"Regex": "(a*)*b"}, "behavior": "Isolated"}],
    "pre_tokenizer.use_regex": [False],
    "pre_tokenizer.add_prefix_space": [True],
    "decoder": [{"type": "Fuse"}],
    "post_processor": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}],
    "model.dropout": [0.5],
    "model.unk_token": ["a"],
    "model.end_of_word_suffix": ["</w>"],
    "model.byte_fallback": [True],
    "model.type": ["WordLevel"],
    "added_tokens": [[], 7],
    # The library would reject these, crash, or load tokens that are not made of bytes.
    "model.vocab.<|sot|>": [1],
    "model.vocab.a": [5000, -1, "a", 0.5, MISSING],
    "model.vocab.東": [300],
    "model.merges": [[["a"]], [["a", "zzz"]], [["zzz", "a"]], "ab", [[1, 2]], MISSING],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in CHANGES.items() for value in values])
def test_a_tokenizer_with_another_setting_is_rejected(
    tokenizer: Tokenizer, load: Callable[[str], Tokenizer], path: str, value: Any
) -> None:
    saved = json.loads(tokenizer.to_json())
    *sections, leaf = path.split(".")
    section = saved
    for name in sections:
        section = section[name]
    section[leaf] = value
    if value is MISSING:
        del section[leaf]
    if leaf == "<|sot|>":  # exchanged with the next one
        section["<|eot|>"] = 0
    with pytest.raises(DataError, match=r"tokenizer\.json") as caught:
        load(json.dumps(saved))
    assert caught.value.message.isprintable()


def test_fields_that_only_some_versions_of_the_library_write_are_ignored(
    tokenizer: Tokenizer, load: Callable[[str], Tokenizer]
) -> None:
    saved = json.loads(tokenizer.to_json())
    saved["new"] = {"a": 1}
    saved["model"]["new"] = True
    del saved["model"]["ignore_merges"], saved["decoder"]["use_regex"], saved["post_processor"]
    assert load(json.dumps(saved)).fingerprint == tokenizer.fingerprint
