"""A corpus as token ids on disk: built once for a corpus and a tokenizer, then memory-mapped from the cache."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lumiere.config.schema import DatasetConfig, RunConfig
from lumiere.data.building import Listener, Progress, build_folder
from lumiere.data.checksums import cache_dir, changed_files
from lumiere.data.corpus import SPLITS, Corpus, load_corpus
from lumiere.data.encoding import OFFSET_TYPE, SplitFacts, id_type, measure, utf_8
from lumiere.data.tokenizer import Tokenizer
from lumiere.data.windows import Windows
from lumiere.errors import DataError, shortened
from lumiere.files import open_file, parse_json, read_file

CACHE_FORMAT = 2
MAX_FACTS_BYTES = 10_000
DOCUMENTS_AT_ONCE = 256
"""Documents encoded in one call, so that all cores are busy."""


@dataclass(frozen=True)
class TokenizedSplit:
    """The ids of one split, mapped from the disk where it comes from the cache.

    Attributes:
        ids: (num_tokens,) all documents one after the other.
        offsets: (num_documents + 1,) where each starts, and where the last one ends.
        vocab_size: ids are less than this.
        path: of its files, without their endings; None where it has none.
    """

    ids: np.ndarray
    offsets: np.ndarray
    facts: SplitFacts
    vocab_size: int
    path: Path | None = None

    def windows(self, context_size: int, sliding_window_size: int, shifts: bool = False) -> Windows:
        return Windows(self.ids, self.offsets, context_size, sliding_window_size, shifts, self.vocab_size, self.path)


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
    config: RunConfig, listener: Listener | None = None, corpus: Corpus | None = None, verify: bool = False
) -> TokenizedCorpus:
    """The corpus of `config` in ids, from the cache if it is there.

    Args:
        listener: called as the work goes on.
        corpus: what `load_corpus(config.dataset)` gives, where it was called already.
        verify: compare the ids in the cache with their checksums, even if their files look unchanged.

    Raises:
        DataError: if the corpus cannot be read or holds no text, or its ids in the cache have changed.
    """
    tell = listener or (lambda _: None)
    tell(Progress("reading the corpus"))
    corpus = corpus or load_corpus(config.dataset)
    if corpus.missing is not None:
        tell(Progress(f"{corpus.missing.message}; the encoded corpus in the cache is used", is_note=True))
    identity = json.dumps([CACHE_FORMAT, corpus.fingerprint, config.tokenizer.model_dump()], sort_keys=True)
    folder = cache_dir() / "corpora" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    is_cached = os.path.isdir(folder) or not build_folder(folder, corpus, config, tell)
    tokenized = read_folder(folder, from_cache=is_cached, verify=verify)
    if len(tokenized.tokenizer) > config.tokenizer.vocab_size:
        raise damaged(folder, f"its tokenizer has {len(tokenized.tokenizer):,} tokens")
    return tokenized


def source_documents(config: DatasetConfig, corpus: TokenizedCorpus, split: str) -> tuple[Iterable[str], bool]:
    """Return the documents of a split that was encoded, and whether they are decoded from its ids.

    They are read from their source; decoded only if its files are gone or have changed, for then they are normalized.
    """
    source = load_corpus(config)
    if source.missing is None:
        return source.documents(split), False
    ids, offsets = corpus.splits[split].ids, corpus.splits[split].offsets
    return (corpus.tokenizer.decode(ids[begin:end]) for begin, end in pairwise(offsets)), True


def tokenize_text(text: str, tokenizer: Tokenizer) -> TokenizedSplit:
    """A single text as a split of one document.

    Raises:
        DataError: if it holds no text.
    """
    if not text.strip():
        raise DataError("the text is empty", "give some text")
    ids = np.array(tokenizer.encode_documents([text])[0])
    facts = SplitFacts(1, len(ids), *measure(text), hashlib.sha256(text.encode()).hexdigest())
    return TokenizedSplit(ids, np.array([0, len(ids)]), facts, len(tokenizer))


def tokenize_documents(documents: Iterable[str], tokenizer: Tokenizer) -> TokenizedSplit:
    """A split in memory, for a corpus that no model was trained on: nothing is kept.

    Raises:
        DataError: if it holds no text.
    """
    ids, sizes, digest = [], [], hashlib.sha256()
    remaining = iter(documents)
    while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        for text, encoded in zip(batch, tokenizer.encode_documents(batch), strict=True):
            ids.append(np.array(encoded))
            sizes.append(measure(text))
            digest.update(utf_8(text) + b"\0")
    if not ids:
        raise DataError("the corpus holds no text", "choose another split or dataset")
    offsets = np.cumsum([0, *map(len, ids)])
    num_bytes, num_words = np.sum(sizes, axis=0).tolist()
    return TokenizedSplit(
        np.concatenate(ids),
        offsets,
        SplitFacts(len(ids), int(offsets[-1]), num_bytes, num_words, digest.hexdigest()),
        len(tokenizer),
    )


def document_sizes(documents: Iterable[str], facts: SplitFacts, are_decoded: bool = False) -> np.ndarray:
    """Bytes and words of each document, (2, num_documents), as `SplitFacts` counts them.

    Args:
        are_decoded: the documents are decoded from ids, so that their sizes are those after normalization.

    Raises:
        DataError: if the documents are not those of `facts`.
    """
    sizes = np.array([measure(text) for text in documents]).T
    if are_decoded:
        return sizes
    if sizes.shape != (2, facts.num_documents) or sizes.sum(1).tolist() != [facts.num_bytes, facts.num_words]:
        raise DataError("the corpus has changed while it was read", "try again, or restore it as it was")
    return sizes


def read_folder(folder: Path, from_cache: bool, verify: bool = False) -> TokenizedCorpus:
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
        changed = changed_files(folder, verify)
    except (OSError, ValueError, TypeError, DataError) as error:
        raise damaged(folder, error.message if isinstance(error, DataError) else shortened(str(error))) from None
    if changed:
        raise damaged(folder, f"{', '.join(changed)} changed after being written")
    if facts.keys() != splits.keys() or not {"train", "validation"} <= splits.keys():
        raise damaged(folder, f"it has the splits {shortened(', '.join(facts))}")
    identity = json.dumps([{split: fields["sha256"] for split, fields in facts.items()}, tokenizer.fingerprint])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return TokenizedCorpus(tokenizer, splits, fingerprint, from_cache)


def read_split(folder: Path, split: str, vocab_size: int, fields: Mapping[str, Any]) -> TokenizedSplit:
    """Map one split's files into memory, and see that they fit each other.

    Its ids and offsets are not read, since there may be billions; `Windows` checks those that it meets.

    Raises:
        OSError, ValueError, TypeError: if they do not, or are damaged.
    """
    facts = SplitFacts(**fields)
    if not facts.is_sound:
        raise ValueError(f"the facts about its {split} split are no facts")
    ids = mapped(folder / f"{split}.ids", id_type(vocab_size))
    offsets = mapped(folder / f"{split}.offsets", OFFSET_TYPE)
    if (len(offsets), len(ids)) != (facts.num_documents + 1, facts.num_tokens):
        raise ValueError(f"its {split} split is cut short")
    if (offsets[0], offsets[-1]) != (0, facts.num_tokens):
        raise ValueError(f"its {split} split has offsets of another text")
    return TokenizedSplit(ids, offsets, facts, vocab_size, folder / split)


def mapped(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """The numbers in a file, read only where and when they are looked at.

    Raises:
        OSError, ValueError: if it is no file, or no whole number of them.
    """
    open_file(path).close()  # of a pipe, NumPy would wait for an end
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def damaged(folder: Path, reason: str) -> DataError:
    return DataError(f"the cached corpus in {str(folder)!r} is damaged: {reason}", "delete that folder")
