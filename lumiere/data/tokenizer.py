"""Byte-level BPE: any text in, token ids out, and the same text back (up to NFKC normalization)."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lumiere.errors import DataError, LumiereError, printable, shortened
from lumiere.files import parse_json, read_file

SOT, EOT, PAD = 0, 1, 2
"""Start of a document, end of a document, padding after its end."""
SPECIAL_TOKENS = ("<|sot|>", "<|eot|>", "<|pad|>")

MAX_BYTES = 200_000_000  # some millions of tokens

VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})


class Tokenizer:
    """A trained tokenizer. `len(tokenizer)` is the number of ids in use.

    Special tokens are added by id, around documents; text that spells one is ordinary text.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Not part of the saved file, so it is set wherever a tokenizer comes from.
        backend.encode_special_tokens = True
        self._backend = backend

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, min_frequency: int) -> "Tokenizer":
        """Learn merges from `documents` until there are `vocab_size` tokens, or none is frequent enough.

        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", on bytes.
        """
        backend = pipeline(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(documents, trainer)
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
            backend = pipeline(models.BPE(saved["model"]["vocab"], merges))
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

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens.

        Raises:
            LumiereError: if `text` holds half of a surrogate pair, which is no character.
        """
        return self.encode_batch([text])[0]

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
    def _bytes(self) -> list[bytes]:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        pieces = (self._backend.id_to_token(i) or "" for i in range(len(SPECIAL_TOKENS), len(self)))
        return [b""] * len(SPECIAL_TOKENS) + [bytes(byte_of[c] for c in piece) for piece in pieces]


def not_a_character() -> LumiereError:
    return LumiereError(
        "the text holds half of a surrogate pair, which is no character", "read it with errors='replace', or remove it"
    )


def pipeline(model: models.BPE) -> tokenizers.Tokenizer:
    """`model` with all that comes before and after it."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFKC()  # pyright: ignore[reportAttributeAccessIssue]
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
    match saved, expected:
        case dict(), dict():
            return all(agree(saved[key], expected[key]) for key in saved.keys() & expected.keys())
        case list(), list():
            return len(saved) == len(expected) and all(map(agree, saved, expected))
        case _:
            return saved == expected


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: 0x100 + i for i, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]
