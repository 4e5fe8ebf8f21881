"""Byte-level BPE tokenizer: lossless up to Unicode normalization."""

import hashlib
import json
import re
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lumiere.data.text import pieces
from lumiere.errors import DataError, LumiereError, printable, shortened
from lumiere.files import parse_json, read_file

SOT, EOT, PAD = 0, 1, 2
"""Ids of the tokens for the start and end of a document, and for padding."""
SPECIAL_TOKENS = ("<|sot|>", "<|eot|>", "<|pad|>")
TOKENIZER_NAME = "tokenizer.json"

MAX_BYTES = 200_000_000  # millions of tokens

FORMS: Mapping[str, Literal["NFKC", "NFC"] | None] = {"nfkc": "NFKC", "nfc": "NFC", "none": None}
"""Unicode normalization forms by value of `tokenizer.normalizer`."""

MAX_LEARNED_BYTES = 1024
"""Longer pre-tokens are split while learning merges, which is quadratic in their length. Encoding splits none."""
SECONDS_BETWEEN_CALLS = 0.1

VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})


class Tokenizer:
    """A trained tokenizer. `len(tokenizer)` is the number of ids in use.

    Special tokens are added around documents by id; text that spells one is ordinary text. All commands start a text
    with the start token, so pass `encode(text, start=True)` to a model.

    Attributes:
        start_id: The token before each document, if there is one.
        end_ids: Tokens that end a document; the first is the one that training adds.
        special_tokens: Tokens that stand for no text, by id.
        splits_text: Whether the ids of the pieces of `lumiere.data.text.pieces`, joined, are those of the whole text.
    """

    start_id: int | None = SOT
    end_ids: tuple[int, ...] = (EOT,)
    special_tokens: Mapping[int, str] = dict(enumerate(SPECIAL_TOKENS))
    splits_text = True

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Not saved in the file, so set wherever a tokenizer comes from.
        backend.encode_special_tokens = True
        self._backend = backend

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        min_frequency: int,
        normalizer: str = "nfkc",
        emit: Callable[[int], None] = lambda _: None,
    ) -> "Tokenizer":
        """Learn merges from `texts` until there are `vocab_size` tokens, or no pair is frequent enough.

        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", on bytes. Pre-tokens are
        split after `MAX_LEARNED_BYTES`, so that text without spaces does not take hours.

        Args:
            texts: Whole documents, or the pieces of `lumiere.data.text.pieces`.
            normalizer: `nfkc`, `nfc` or `none`.
            emit: Called with the number of bytes read so far, several times per second.
        """
        backend = pipeline(models.BPE(), normalizer)
        whole = backend.pre_tokenizer
        cut = pre_tokenizers.FixedLength(MAX_LEARNED_BYTES)
        backend.pre_tokenizer = pre_tokenizers.Sequence([whole, cut])  # pyright: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        num_bytes = 0

        def counted() -> Iterator[str]:
            nonlocal num_bytes
            for text in texts:
                yield text
                num_bytes += len(text.encode(errors="replace"))

        run_in_thread(lambda: backend.train_from_iterator(counted(), trainer), lambda: emit(num_bytes))
        backend.pre_tokenizer = whole  # pyright: ignore[reportAttributeAccessIssue]
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a `tokenizer.json`.

        Uses only its vocabulary, merges and normalizer. The library would accept everything: patterns that backtrack
        forever, gigabytes of padding, a length limit that silently truncates text.

        Raises:
            DataError: The file is missing, damaged, or another kind of tokenizer.
        """
        try:
            saved = parse_json(read_file(path, MAX_BYTES))
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise DataError(f"{str(path)!r} cannot be read as a tokenizer: {reason}", "restore the file") from None
        try:
            check_vocabulary(saved["model"]["vocab"])
            merges = [(left, right) for left, right in saved["model"]["merges"]]
            backend = pipeline(models.BPE(saved["model"]["vocab"], merges), normalizer_name(saved["normalizer"]))
            backend.add_special_tokens(list(SPECIAL_TOKENS))
            expected = json.loads(backend.to_str())
        except Exception as error:  # the library raises bare Exception for invalid merges
            reason = shortened(f"{type(error).__name__}: {error}")
            raise DataError(f"{str(path)!r} is not a Lumiere tokenizer ({reason})", "restore the file") from None
        if differs := [key for key in expected if key in saved and not agree(saved[key], expected[key])]:
            raise DataError(
                f"{str(path)!r} is not a Lumiere tokenizer: it has another {', '.join(differs)}", "restore the file"
            )
        return cls(backend)

    def to_json(self) -> str:
        """Return the tokenizer in the format of `tokenizers` and `transformers`."""
        return self._backend.to_str(pretty=True)

    def files(self) -> dict[str, str]:
        """Return the contents of the files that a run keeps of the tokenizer, by name."""
        return {TOKENIZER_NAME: self.to_json()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines how text is tokenized."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    @cached_property
    def normalizer(self) -> str:
        """Unicode normalization: `nfkc`, `nfc` or `none`."""
        return normalizer_name(json.loads(self._backend.to_str())["normalizer"])

    def normalize(self, text: str) -> str:
        """Return the text that `decode(encode(text))` returns.

        Raises:
            LumiereError: `text` contains half of a surrogate pair.
        """
        if self._backend.normalizer is None:
            return text
        try:
            return self._backend.normalizer.normalize_str(text)
        except (UnicodeError, TypeError):
            raise not_a_character() from None

    def num_bytes_changed(self, text: str) -> int:
        """Return the number of UTF-8 bytes of `text` in characters that the normalizer changes.

        Combining characters, such as accents, count together with the character before.
        """
        form = FORMS[self.normalizer]
        if form is None or text.isascii() or unicodedata.is_normalized(form, text):
            return 0
        characters = set(text)
        combining = "".join(filter(combines, characters))
        changing = "".join(c for c in characters if self.normalize(c) != c)
        groups = [f"[{re.escape(changing)}]"] if changing else []
        if combining:
            groups.insert(0, f"[^{re.escape(combining)}]?[{re.escape(combining)}]+")
        if not groups:
            return 0
        found = (match[0] for match in re.finditer("|".join(groups), text))
        return sum(len(group.encode()) for group in found if self.normalize(group) != group)

    def encode(self, text: str, start: bool = False) -> list[int]:
        """Return the ids of `text`.

        Args:
            start: Prepend the start token, if there is one, as training, `generate`, `eval` and `inspect` do: models
                never saw a document without it.

        Raises:
            LumiereError: `text` contains half of a surrogate pair.
        """
        before = [self.start_id] if start and self.start_id is not None else []
        texts = list(pieces([text])) if self.splits_text else [text]
        return [*before, *chain.from_iterable(self.encode_batch(texts))]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, computed in parallel."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeError, TypeError):
            raise not_a_character() from None
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens` without special tokens; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of tokens that stand for no text."""
        return frozenset(self.special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token; none for special tokens and unused ids."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def label(self, token: int) -> str:
        """Return a token in printable form: spaces as ·, line ends as ↵, lone bytes as \\xe2."""
        if token in self.special_tokens:
            return printable(self.special_tokens[token])
        return printable(self.token_bytes(token).decode("utf-8", errors="backslashreplace").translate(VISIBLE))

    @cached_property
    def text_ids(self) -> list[int]:
        """The ids of tokens that stand for text, in order."""
        return [token for token, spelled in enumerate(self._bytes) if spelled and token not in self.special_tokens]

    @cached_property
    def token_sizes(self) -> list[int]:
        """The number of bytes of each token."""
        return list(map(len, self._bytes))

    @cached_property
    def _bytes(self) -> list[bytes]:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        pieces = (self._backend.id_to_token(i) or "" for i in range(len(SPECIAL_TOKENS), len(self)))
        return [b""] * len(SPECIAL_TOKENS) + [bytes(map(byte_of.__getitem__, piece)) for piece in pieces]


def not_a_character() -> LumiereError:
    return LumiereError(
        "the text contains half of a surrogate pair, which is no character",
        "read it with errors='replace', or remove it",
    )


def run_in_thread(work: Callable[[], None], wait: Callable[[], None]) -> None:
    """Call `work` in a thread, and `wait` several times per second and once after it.

    An interrupt raises here at once, although the library never checks for one; the thread ends with the process.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    is_done = False
    while not is_done:
        thread.join(SECONDS_BETWEEN_CALLS)
        is_done = not thread.is_alive()
        wait()
    if errors:
        raise errors[0]


def normalizer_name(saved: dict[str, Any] | None) -> str:
    """Return the name of a normalizer in a saved tokenizer.

    Raises:
        ValueError: Lumiere does not have it.
    """
    name = "none" if saved is None else str(saved["type"]).lower()
    if name not in FORMS:
        raise ValueError(f"it has the normalizer {name}")
    return name


def combines(character: str) -> bool:
    """Return whether a character may join the one before it: marks, and vowels and finals of Hangul."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"


def pipeline(model: models.BPE, normalizer: str) -> tokenizers.Tokenizer:
    """Return `model` with its normalizer, pre-tokenizer and decoder."""
    backend = tokenizers.Tokenizer(model)
    if form := FORMS[normalizer]:
        backend.normalizer = getattr(normalizers, form)()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def check_vocabulary(vocab: dict[str, int]) -> None:
    """Check that `Tokenizer.train` could have produced a vocabulary.

    Raises:
        ValueError: Its ids are not 0, 1, 2, ..., or it lacks a special token, a byte, or the bytes of a token.
    """
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))) or not all(tokens):
        raise ValueError("the ids of its tokens are not 0, 1, 2, ...")
    if tuple(tokens[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
        raise ValueError(f"its first tokens are not {', '.join(SPECIAL_TOKENS)}")
    characters = set(byte_characters())
    if not characters <= vocab.keys() or not characters.issuperset("".join(tokens[len(SPECIAL_TOKENS) :])):
        raise ValueError("its tokens are not made of bytes")


def agree(saved: Any, expected: Any) -> bool:
    """Return whether two JSON values are equal, except for keys that only one has: library versions differ."""
    if saved == expected:
        return True
    match saved, expected:
        case dict(), dict():
            return all(agree(saved[key], expected[key]) for key in saved.keys() & expected.keys())
        case list(), list():
            return len(saved) == len(expected) and all(map(agree, saved, expected))
        case _:
            return False


def byte_characters() -> list[str]:
    """Return the printable character for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 bytes map to themselves, the others to the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: 0x100 + i for i, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]
