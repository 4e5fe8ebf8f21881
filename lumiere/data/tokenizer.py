"""Byte-level BPE: any text in, token ids out, and the same text back (up to Unicode normalization)."""

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
"""Start of a document, end of a document, padding after its end."""
SPECIAL_TOKENS = ("<|sot|>", "<|eot|>", "<|pad|>")

MAX_BYTES = 200_000_000  # some millions of tokens

FORMS: Mapping[str, Literal["NFKC", "NFC"] | None] = {"nfkc": "NFKC", "nfc": "NFC", "none": None}
"""What `tokenizer.normalizer` may be."""

MAX_LEARNED_BYTES = 1024
"""Longer pre-tokens are cut while merges are learned, in time quadratic in their length. Encoding cuts none."""
SECONDS_BETWEEN_CALLS = 0.1

VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})


class Tokenizer:
    """A trained tokenizer. `len(tokenizer)` is the number of ids in use.

    Special tokens are added by id, around documents; text that spells one is ordinary text. Every command begins a text
    with the start token, so give a model `encode(text, start=True)`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Not part of the saved file, so it is set wherever a tokenizer comes from.
        backend.encode_special_tokens = True
        self._backend = backend

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        min_frequency: int,
        normalizer: str = "nfkc",
        tell: Callable[[int], None] = lambda _: None,
    ) -> "Tokenizer":
        """Learn merges from `texts` until there are `vocab_size` tokens, or none is frequent enough.

        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", on bytes. Pre-tokens are
        cut after `MAX_LEARNED_BYTES`, so that a text without spaces does not take hours.

        Args:
            texts: Whole documents, or the pieces of `lumiere.data.text.pieces`.
            normalizer: `nfkc`, `nfc` or `none`.
            tell: Called with the number of bytes read so far, some times a second.
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

        run_in_thread(lambda: backend.train_from_iterator(counted(), trainer), lambda: tell(num_bytes))
        backend.pre_tokenizer = whole  # pyright: ignore[reportAttributeAccessIssue]
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`.

        Nothing but the vocabulary and the merges is taken from it. The library would take everything: patterns that
        never end, padding of gigabytes, a limit of length that drops text without a word.

        Raises:
            DataError: if the file is missing, damaged, or another kind of tokenizer.
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
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the merges
            reason = shortened(f"{type(error).__name__}: {error}")
            raise DataError(
                f"{str(path)!r} is not one of Lumiere's tokenizers ({reason})", "restore the file"
            ) from None
        if differs := [key for key in expected if key in saved and not agree(saved[key], expected[key])]:
            raise DataError(
                f"{str(path)!r} is not one of Lumiere's tokenizers: it has another {', '.join(differs)}",
                "restore the file",
            )
        return cls(backend)

    def to_json(self) -> str:
        """The tokenizer as `tokenizers` and `transformers` load it."""
        return self._backend.to_str(pretty=True)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides how text is split."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    @cached_property
    def normalizer(self) -> str:
        """What is done to a text first: `nfkc`, `nfc` or `none`."""
        return normalizer_name(json.loads(self._backend.to_str())["normalizer"])

    def normalize(self, text: str) -> str:
        """Return the text that `decode(encode(text))` gives back.

        Raises:
            LumiereError: `text` has half of a surrogate pair.
        """
        if self._backend.normalizer is None:
            return text
        try:
            return self._backend.normalizer.normalize_str(text)
        except (UnicodeError, TypeError):
            raise not_a_character() from None

    def num_bytes_changed(self, text: str) -> int:
        """Return how many UTF-8 bytes of `text` belong to characters that the normalizer changes.

        Characters that combine with the one before, such as accents, count as one with it.
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
            start: Put the start token `<|sot|>` first, as training, `generate`, `eval` and `inspect` do. A model has
                never seen a document without it.

        Raises:
            LumiereError: `text` has half of a surrogate pair, which is no character.
        """
        return [*([SOT] if start else []), *chain.from_iterable(self.encode_batch(list(pieces([text]))))]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed in parallel."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeError, TypeError):
            raise not_a_character() from None
        return [encoding.ids for encoding in encodings]

    def encode_documents(self, documents: Sequence[str]) -> list[list[int]]:
        """The ids of each document between the tokens that mark its start and its end."""
        return [[SOT, *ids, EOT] for ids in self.encode_batch(documents)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; none for special tokens and unused ids."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def label(self, token: int) -> str:
        """One token in printable form: spaces as ·, line ends as ↵, lone bytes as \\xe2."""
        if 0 <= token < len(SPECIAL_TOKENS):
            return SPECIAL_TOKENS[token]
        return printable(self.token_bytes(token).decode("utf-8", errors="backslashreplace").translate(VISIBLE))

    @cached_property
    def token_sizes(self) -> list[int]:
        """The number of bytes that each token stands for."""
        return list(map(len, self._bytes))

    @cached_property
    def _bytes(self) -> list[bytes]:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        pieces = (self._backend.id_to_token(i) or "" for i in range(len(SPECIAL_TOKENS), len(self)))
        return [b""] * len(SPECIAL_TOKENS) + [bytes(map(byte_of.__getitem__, piece)) for piece in pieces]


def not_a_character() -> LumiereError:
    return LumiereError(
        "the text holds half of a surrogate pair, which is no character", "read it with errors='replace', or remove it"
    )


def run_in_thread(work: Callable[[], None], wait: Callable[[], None]) -> None:
    """Call `work` in a thread, and `wait` some times a second until it is done.

    An interrupt raises here at once, though the library never looks for one; the thread then ends with the process.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(SECONDS_BETWEEN_CALLS)
        wait()
    if errors:
        raise errors[0]


def normalizer_name(saved: dict[str, Any] | None) -> str:
    """Return the name of a normalizer in a saved tokenizer.

    Raises:
        ValueError: It is none of ours.
    """
    name = "none" if saved is None else str(saved["type"]).lower()
    if name not in FORMS:
        raise ValueError(f"it has the normalizer {name}")
    return name


def combines(character: str) -> bool:
    """Return whether a character may join the one before it: marks, and vowels and finals of Hangul."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"


def pipeline(model: models.BPE, normalizer: str) -> tokenizers.Tokenizer:
    """`model` with all that comes before and after it."""
    backend = tokenizers.Tokenizer(model)
    if form := FORMS[normalizer]:
        backend.normalizer = getattr(normalizers, form)()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def check_vocabulary(vocab: dict[str, int]) -> None:
    """Whether a vocabulary is one that `Tokenizer.train` could have made.

    Raises:
        ValueError: its ids are not 0, 1, 2, ...; or special tokens, a byte, or the bytes of a token are missing.
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
    """Whether two JSON values are the same, but for keys that only one of them has: versions of the library differ."""
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
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: 0x100 + i for i, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]
