"""A corpus as token ids on disk: built once for a corpus and a tokenizer, then memory-mapped from the cache."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from lumiere.config.schema import RunConfig
from lumiere.data.corpus import SPLITS, Corpus, load_corpus
from lumiere.data.tokenizer import Tokenizer
from lumiere.data.windows import Windows
from lumiere.errors import DataError, LumiereError, shortened
from lumiere.files import open_file, parse_json, read_file

CACHE_FORMAT = 1
MAX_FACTS_BYTES = 10_000
DOCUMENTS_AT_ONCE = 256
"""Documents encoded in one call: enough to keep all cores busy, few enough to show progress."""


@dataclass(frozen=True)
class Progress:
    """How far `tokenize_corpus` has come: `done` of `total` documents (None: not known)."""

    stage: str
    done: int = 0
    total: int | None = None


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class SplitFacts:
    """What is known of a split's text.

    Attributes:
        num_bytes: UTF-8 bytes of its documents, before normalization.
        num_words: words by white space, line ends counted as words.
        sha256: of its documents.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_words: int
    sha256: str

    @property
    def num_targets(self) -> int:
        """Tokens that a model predicts, each counted once: all but each document's first."""
        return self.num_tokens - self.num_documents


@dataclass(frozen=True)
class TokenizedSplit:
    """The ids of one split: (num_tokens,) all documents one after the other, and where each starts and ends."""

    ids: np.ndarray
    offsets: np.ndarray
    facts: SplitFacts

    def windows(self, context_size: int, sliding_window_size: int, shifts: bool = False) -> Windows:
        return Windows(self.ids, self.offsets, context_size, sliding_window_size, shifts)


@dataclass(frozen=True)
class TokenizedCorpus:
    """A tokenizer and the splits that it encoded.

    Attributes:
        fingerprint: SHA-256 of the text of all splits and of the tokenizer.
        from_cache: whether it was there already.
    """

    tokenizer: Tokenizer
    splits: Mapping[str, TokenizedSplit]
    fingerprint: str
    from_cache: bool

    def windows(self, split: str, config: RunConfig) -> Windows:
        """The windows of a split as `config` cuts them.

        Raises:
            DataError: if the corpus has no such split.
        """
        if split not in self.splits:
            raise DataError(f"the corpus has no split '{split}'", f"it has {', '.join(self.splits)}")
        sizes = (config.model.context_size, config.dataset.sliding_window_size)
        return self.splits[split].windows(*sizes, shifts=config.training.random_window_offset and split == "train")


def tokenize_corpus(
    config: RunConfig, listener: Listener | None = None, corpus: Corpus | None = None
) -> TokenizedCorpus:
    """The corpus of `config` in ids, from the cache if it is there.

    Args:
        listener: called as the work goes on.
        corpus: what `load_corpus(config.dataset)` gives, where it was called already.

    Raises:
        DataError: if the corpus cannot be read or holds no text.
    """
    tell = listener or (lambda _: None)
    tell(Progress("reading the corpus"))
    corpus = corpus or load_corpus(config.dataset)
    identity = json.dumps([CACHE_FORMAT, corpus.fingerprint, config.tokenizer.model_dump()], sort_keys=True)
    folder = cache_dir() / "corpora" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    is_cached = os.path.isdir(folder)
    if not is_cached:
        build_folder(folder, corpus, config, tell)
    tokenized = read_folder(folder, from_cache=is_cached)
    if len(tokenized.tokenizer) > config.tokenizer.vocab_size:
        raise damaged(folder, f"its tokenizer has {len(tokenized.tokenizer):,} tokens")
    return tokenized


def tokenize_text(text: str, tokenizer: Tokenizer) -> TokenizedSplit:
    """A single text as a split of one document.

    Raises:
        DataError: if it holds no text.
    """
    if not text.strip():
        raise DataError("the text is empty", "give some text")
    ids = np.array(tokenizer.encode_documents([text])[0])
    facts = SplitFacts(1, len(ids), *measure(text), hashlib.sha256(text.encode()).hexdigest())
    return TokenizedSplit(ids, np.array([0, len(ids)]), facts)


def tokenize_documents(documents: Iterable[str], tokenizer: Tokenizer) -> TokenizedSplit:
    """A split in memory, for a corpus that no model was trained on: nothing is kept.

    Raises:
        DataError: if it holds no text.
    """
    ids, sizes, digest = [], [], hashlib.sha256()
    for batch in batched(documents, DOCUMENTS_AT_ONCE):
        for text, encoded in zip(batch, tokenizer.encode_documents(batch), strict=True):
            ids.append(np.array(encoded))
            sizes.append(measure(text))
            digest.update(text.encode() + b"\0")
    if not ids:
        raise DataError("the corpus holds no text", "choose another split or dataset")
    offsets = np.cumsum([0, *map(len, ids)])
    num_bytes, num_words = np.sum(sizes, axis=0).tolist()
    return TokenizedSplit(
        np.concatenate(ids), offsets, SplitFacts(len(ids), int(offsets[-1]), num_bytes, num_words, digest.hexdigest())
    )


def document_sizes(documents: Iterable[str], facts: SplitFacts) -> np.ndarray:
    """Bytes and words of each document, (2, num_documents), as `SplitFacts` counts them.

    Raises:
        DataError: if the documents are not those of `facts`.
    """
    sizes = np.array([measure(text) for text in documents]).T
    if sizes.shape != (2, facts.num_documents) or sizes.sum(1).tolist() != [facts.num_bytes, facts.num_words]:
        raise DataError("the corpus has changed while it was read", "try again, or restore it as it was")
    return sizes


def cache_dir() -> Path:
    """Where encoded corpora are kept between runs; `LUMIERE_CACHE_DIR` overrides it."""
    return Path(os.environ.get("LUMIERE_CACHE_DIR") or platformdirs.user_cache_dir("lumiere"))


def build_folder(folder: Path, corpus: Corpus, config: RunConfig, tell: Listener) -> None:
    """Train the tokenizer and encode every split, in a folder of its own that takes its name only when whole."""
    counts = {split: sum(1 for _ in corpus.documents(split)) for split in corpus.splits}
    for split in ("train", "validation"):
        if not counts[split]:
            raise DataError(
                f"the {split} split of dataset '{config.dataset.name}' holds no text",
                "check dataset.name, dataset.data_files and dataset.text_column",
            )
    tell(Progress("training the tokenizer"))
    tokenizer = Tokenizer.train(corpus.documents("train"), config.tokenizer.vocab_size, config.tokenizer.min_frequency)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        (temporary / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        facts = {
            split: asdict(encode_split(temporary, split, corpus, tokenizer, count, tell))
            for split, count in counts.items()
            if count
        }
        (temporary / "splits.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError as error:
            # Another process has built the same folder meanwhile; both hold the same.
            if not folder.is_dir():
                raise unwritable(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def encode_split(
    folder: Path, split: str, corpus: Corpus, tokenizer: Tokenizer, total: int, tell: Listener
) -> SplitFacts:
    """Write one split's ids and offsets into `folder`, batch by batch."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    digest, offsets, num_bytes, num_words = hashlib.sha256(), [0], 0, 0
    with open(folder / f"{split}.ids", "wb") as file:
        for documents in batched(corpus.documents(split), DOCUMENTS_AT_ONCE):
            for text, ids in zip(documents, tokenizer.encode_documents(documents), strict=True):
                file.write(np.array(ids, dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(ids))
                text_bytes, text_words = measure(text)
                num_bytes += text_bytes
                num_words += text_words
                digest.update(text.encode() + b"\0")
            tell(Progress(f"encoding the {split} split", len(offsets) - 1, total))
    np.save(folder / f"{split}.offsets.npy", np.array(offsets, dtype=np.int64))
    return SplitFacts(len(offsets) - 1, offsets[-1], num_bytes, num_words, digest.hexdigest())


def read_folder(folder: Path, from_cache: bool) -> TokenizedCorpus:
    """Map a folder that `build_folder` made into memory.

    Raises:
        DataError: if files are missing or damaged.
    """
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        facts = parse_json(read_file(folder / "splits.json", MAX_FACTS_BYTES))
        if not isinstance(facts, dict):
            raise ValueError("it says nothing of its splits")
        # By the names of the splits and not by the file's: those could lead out of the folder.
        splits = {split: read_split(folder, split, len(tokenizer), facts[split]) for split in SPLITS if split in facts}
    except (OSError, ValueError, TypeError, DataError) as error:
        raise damaged(folder, error.message if isinstance(error, DataError) else shortened(str(error))) from None
    if facts.keys() != splits.keys() or not {"train", "validation"} <= splits.keys():
        raise damaged(folder, f"it has the splits {shortened(', '.join(facts))}")
    identity = json.dumps([{split: fields["sha256"] for split, fields in facts.items()}, tokenizer.fingerprint])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return TokenizedCorpus(tokenizer, splits, fingerprint, from_cache)


def read_split(folder: Path, split: str, vocab_size: int, fields: Mapping[str, Any]) -> TokenizedSplit:
    """Map one split's files into memory, and see that they fit each other.

    Raises:
        OSError, ValueError, TypeError: if they do not, or are damaged.
    """
    facts = SplitFacts(**fields)
    counts = (facts.num_documents, facts.num_tokens, facts.num_bytes, facts.num_words)
    sound = all(isinstance(count, int) and count > 0 for count in counts)
    if not sound or not isinstance(facts.sha256, str):
        raise ValueError(f"the facts about its {split} split are no facts")
    paths = folder / f"{split}.ids", folder / f"{split}.offsets.npy"
    for path in paths:
        open_file(path).close()  # of a pipe, NumPy would wait for an end
    ids = np.memmap(paths[0], dtype=np.uint16 if vocab_size <= 2**16 else np.uint32, mode="r")
    # Not by `np.load`, which reads archives too, and allocates as much as a header asks for.
    offsets = np.lib.format.open_memmap(paths[1], mode="r")
    if offsets.dtype != np.int64 or offsets.shape != (facts.num_documents + 1,):
        raise ValueError(f"the offsets of its {split} split are no offsets")
    if (len(ids), offsets[0], offsets[-1]) != (facts.num_tokens, 0, facts.num_tokens) or np.diff(offsets).min() < 1:
        raise ValueError(f"its {split} split is cut short")
    if ids.max() >= vocab_size:
        raise ValueError(f"its {split} split holds an id that is none of its tokenizer's")
    return TokenizedSplit(ids, np.array(offsets), facts)


def damaged(folder: Path, reason: str) -> DataError:
    return DataError(f"the cached corpus in {str(folder)!r} is damaged: {reason}", "delete that folder")


def unwritable(folder: Path, error: OSError) -> LumiereError:
    return LumiereError(f"the cache {str(folder)!r} cannot be written: {error.strerror}", "set LUMIERE_CACHE_DIR")


def measure(text: str) -> tuple[int, int]:
    """UTF-8 bytes, and words by white space with line ends counted."""
    return len(text.encode()), len(text.split()) + text.count("\n")


def batched(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    """`documents` in lists of at most `size`."""
    iterator = iter(documents)
    while batch := list(islice(iterator, size)):
        yield batch
