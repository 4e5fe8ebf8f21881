"""Tokenizers from elsewhere: any byte-level BPE, BPE with byte fallback, or Unigram `tokenizer.json`, used as it is.

The file may come from a stranger, and the library trusts it: a pattern can backtrack forever, a broken model can panic
past `except Exception`, a length limit silently truncates text. A child process with limits tries it first
(`lumiere.data.tokenizer_probe`); then truncation and padding are switched off, and special tokens are never parsed from
text.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lumiere.config.schema import TokenizerConfig
from lumiere.data.tokenizer import MAX_BYTES, SOT, SPECIAL_TOKENS, TOKENIZER_NAME, Tokenizer, byte_characters
from lumiere.data.tokenizer_probe import probe
from lumiere.errors import ConfigError, DataError, printable, shortened
from lumiere.files import parse_json, read_file

CONFIG_NAME = "tokenizer_config.json"
MAX_CONFIG_BYTES = 10_000_000
MODELS = ("BPE", "Unigram")
SPACE = "\u2581"
"""What stands for a space in vocabularies of SentencePiece."""
GPT_2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
"""The pre-tokenizer of which `lumiere.data.text.CUT` is known to change no ids."""
NO_TEXT = "\U0010ffff"
"""A noncharacter in place of pieces that no text may become."""
KNOWN_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot|>")
"""Names of the end of a document, tried where no setting names it."""


@dataclass(frozen=True)
class SpecialTokens:
    """What surrounds a document.

    Attributes:
        start: The token before each document; None if the source adds none.
        ends: Tokens that end a document.
        chat_template: Kept as text and never rendered.
    """

    start: str | None
    ends: tuple[str, ...]
    chat_template: str | None = None


class ForeignTokenizer(Tokenizer):
    """A tokenizer from elsewhere, with its own normalizer, vocabulary and special tokens.

    Args:
        text: The contents of its `tokenizer.json`, which the probe has accepted.

    Raises:
        ValueError: It is of another kind, or lacks a token that `special` names.
    """

    def __init__(self, text: str, special: SpecialTokens) -> None:
        contents = json.loads(text)
        self.special_tokens = {token["id"]: token["content"] for token in contents["added_tokens"] if token["special"]}
        backend = tokenizers.Tokenizer.from_str(json.dumps(unspelled(contents)))
        backend.no_truncation()
        backend.no_padding()
        super().__init__(backend)
        if (kind := contents["model"].get("type")) not in MODELS:
            raise ValueError(f"its model is {kind}, and Lumiere reads {' and '.join(MODELS)}")
        self._text, self._special = text, special
        self._added = {token["content"]: token["id"] for token in contents["added_tokens"]}
        pieces = contents["model"]["vocab"]
        vocab = pieces if isinstance(pieces, dict) else {piece: token for token, (piece, _) in enumerate(pieces)}
        self._vocab: dict[str, int] = vocab | self._added
        self._spelling = spelling(contents)
        self.splits_text = contents["pre_tokenizer"] is not None and all(
            contents["pre_tokenizer"].get(key) == value for key, value in GPT_2_SPLIT.items()
        )
        if unknown := {token for token in (special.start, *special.ends) if token} - self._vocab.keys():
            raise ValueError(f"it has no token {shortened(printable(min(unknown)))}")
        self.start_id = None if special.start is None else self._vocab[special.start]
        self.end_ids = tuple(dict.fromkeys(self._vocab[token] for token in special.ends))

    @classmethod
    def load(cls, path: Path) -> "ForeignTokenizer":
        """Load a `tokenizer.json`, with the `tokenizer_config.json` beside it if there is one.

        Raises:
            DataError: A file cannot be read, or Lumiere cannot use the tokenizer.
        """
        return cls.parse(read_text(path, MAX_BYTES), read_config(path.with_name(CONFIG_NAME)), str(path))

    @classmethod
    def parse(cls, text: str, config: Mapping[str, Any], name: str, end_ids: Any = None) -> "ForeignTokenizer":
        """Make a tokenizer of the contents of `tokenizer.json` and `tokenizer_config.json`.

        Args:
            name: The file, for errors.
            end_ids: Ids that end a text besides `eos_token`, as `generation_config.json` has them.

        Raises:
            DataError: It is no tokenizer that Lumiere can use.
        """
        probe(text, name)
        try:
            return cls(text, special_tokens(tokenizers.Tokenizer.from_str(text), config, end_ids))
        except Exception as error:  # the library raises bare Exception
            reason = shortened(printable(str(error) or type(error).__name__))
            raise DataError(f"{name!r} cannot be used as a tokenizer: {reason}", HINT) from None

    def to_json(self) -> str:
        return self._text

    def files(self) -> dict[str, str]:
        special = self._special
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special.start,
            "add_bos_token": special.start is not None,
            "eos_token": next(iter(special.ends), None),
            "end_tokens": list(special.ends),
            "chat_template": special.chat_template,
        }
        return {TOKENIZER_NAME: self._text, CONFIG_NAME: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256("\0".join(self.files().values()).encode()).hexdigest()

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        return max(self._vocab.values()) + 1

    def normalize(self, text: str) -> str:
        return self.decode(self.encode(text))

    def num_bytes_changed(self, text: str) -> int:
        """Return the number of UTF-8 bytes of `text` in characters that do not survive encoding and decoding."""
        if self.normalize(text) == text:
            return 0
        changing = {character for character in set(text) if character not in self.normalize(f"x{character}x")}
        return sum(len(character.encode()) for character in text if character in changing)

    @cached_property
    def _prefix(self) -> str:
        """What the tokenizer puts before each text: a space, or nothing."""
        return " " if super().decode(self.encode("x")).startswith(" ") else ""

    def decode(self, tokens: Sequence[int]) -> str:
        return super().decode(tokens).removeprefix(self._prefix)

    @cached_property
    def _bytes(self) -> list[bytes]:
        found = [b""] * len(self)
        for piece, token in self._vocab.items():
            if token not in self.special_tokens:
                found[token] = piece.encode() if piece in self._added else self._spelling(piece)
        return found


HINT = "give the tokenizer.json of a byte-level BPE, SentencePiece BPE or Unigram tokenizer"


def unspelled(contents: dict[str, Any]) -> dict[str, Any]:
    """Return a `tokenizer.json` in which no text spells a special token.

    A Unigram model would match them like any other piece, whatever `encode_special_tokens` says.
    """
    model = contents["model"]
    if model.get("type") != "Unigram":
        return contents
    special = {token["id"] for token in contents["added_tokens"] if token["special"]} - {model.get("unk_id")}
    pieces = [
        [NO_TEXT, score] if token in special else [piece, score] for token, (piece, score) in enumerate(model["vocab"])
    ]
    added = [token for token in contents["added_tokens"] if token["id"] not in special]
    return contents | {"model": model | {"vocab": pieces}, "added_tokens": added}


def spelling(contents: Mapping[str, Any]) -> Callable[[str], bytes]:
    """Return the function from a piece of the vocabulary to its bytes, by the decoder in a `tokenizer.json`.

    Raises:
        ValueError: There is no decoder that Lumiere knows.
    """
    decoder = contents["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}

        def byte_level(piece: str) -> bytes:
            return b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in piece)

        return byte_level
    if not kinds & {"Metaspace", "Replace", "ByteFallback"}:
        raise ValueError(f"its decoder is {decoder.get('type')}")

    def sentencepiece(piece: str) -> bytes:
        if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE, " ").encode()

    return sentencepiece


def special_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], end_ids: Any) -> SpecialTokens:
    """Return what surrounds a document, by a `tokenizer_config.json`.

    The start token is `bos_token` where `add_bos_token` is true, and what the tokenizer itself puts first where there
    is no such key. `end_tokens` is Lumiere's key for several; `eos_token` names one.

    Raises:
        ValueError: It puts several tokens before a document.
    """

    def named(key: str) -> str | None:
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    adds = config.get("add_bos_token")
    start = named("bos_token") if adds is True else None
    if not isinstance(adds, bool):
        plain, whole = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
        first = whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
        if len(first) > 1:
            raise ValueError(f"it puts {len(first)} tokens before each text")
        start = backend.id_to_token(first[0]) if first else None
    ends = config.get("end_tokens")
    if not isinstance(ends, list):
        others = end_ids if isinstance(end_ids, list) else [end_ids]
        ends = [named("eos_token"), *(backend.id_to_token(end) for end in others if isinstance(end, int))]
        if not any(ends):
            ends = [token for token in KNOWN_ENDS if backend.token_to_id(token) is not None][:1]
    template = config.get("chat_template")
    return SpecialTokens(
        start, tuple(end for end in ends if isinstance(end, str)), template if isinstance(template, str) else None
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load Lumiere's own tokenizer, or one from elsewhere, which has its settings beside it.

    Raises:
        DataError: It cannot be read, or is of no kind that Lumiere can use.
    """
    return ForeignTokenizer.load(path) if path.with_name(CONFIG_NAME).exists() else Tokenizer.load(path)


def existing_tokenizer(settings: TokenizerConfig) -> Tokenizer | None:
    """Load the tokenizer of `tokenizer.path`: a `tokenizer.json`, or a folder that has one. None: there is no path.

    Raises:
        DataError: As `load_tokenizer`.
    """
    if settings.path is None:
        return None
    path = Path(settings.path)
    path = path / TOKENIZER_NAME if path.is_dir() else path
    if path.with_name(CONFIG_NAME).exists():
        return ForeignTokenizer.load(path)
    contents = json.loads(read_text(path, MAX_BYTES))
    model = contents.get("model") if isinstance(contents, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    is_own = isinstance(vocab, dict) and vocab.get(SPECIAL_TOKENS[SOT]) == SOT
    return Tokenizer.load(path) if is_own else ForeignTokenizer.load(path)


def fitted(settings: TokenizerConfig, tokenizer: Tokenizer | None) -> TokenizerConfig:
    """Return the settings with a row of the embedding for each token of an existing tokenizer.

    Raises:
        ConfigError: `vocab_size` is given, and too small.
    """
    if tokenizer is None or settings.vocab_size == len(tokenizer):
        return settings
    if "vocab_size" not in settings.model_fields_set:
        return settings.model_copy(update={"vocab_size": len(tokenizer)})
    if settings.vocab_size < len(tokenizer):
        raise ConfigError(
            f"tokenizer.vocab_size is {settings.vocab_size:,}, and the tokenizer has {len(tokenizer):,} tokens",
            f"leave it out, or use --set tokenizer.vocab_size={len(tokenizer)}",
        )
    return settings


def read_text(path: Path, limit: int) -> str:
    """Read a JSON file as text.

    Raises:
        DataError: It cannot be read, is too large, or is not JSON.
    """
    try:
        data = read_file(path, limit)
        parse_json(data)
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{str(path)!r} cannot be read as a tokenizer: {reason}", HINT) from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the contents of a `tokenizer_config.json`; nothing if there is none.

    Raises:
        DataError: It cannot be read.
    """
    if not path.exists():
        return {}
    contents = json.loads(read_text(path, MAX_CONFIG_BYTES))
    return contents if isinstance(contents, dict) else {}
