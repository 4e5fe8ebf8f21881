"""Corpora in the cache: built by one process at a time, in a folder that takes its name only when it is whole."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lumiere.config.schema import RunConfig
from lumiere.data.checksums import cache_dir, write_checksums
from lumiere.data.corpus import Corpus
from lumiere.data.encoding import SplitFacts, encode_split, write_durably
from lumiere.data.text import Part
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import DataError, LumiereError

UNFINISHED = ".building-"
UNFINISHED_DAYS = 14
"""After so many days without a change, an unfinished corpus is removed when another one is built."""


@dataclass(frozen=True)
class Progress:
    """How far a corpus is built: `done` of `total` documents (None: not known), and the text so far.

    With `is_note`, `stage` is a remark for the user.
    """

    stage: str
    done: int = 0
    total: int | None = None
    num_bytes: int = 0
    is_note: bool = False


Listener = Callable[[Progress], None]


def build_folder(folder: Path, corpus: Corpus, config: RunConfig, tell: Listener) -> bool:
    """Train the tokenizer and encode every split; go on where a former process was stopped.

    Returns:
        Whether it was built here, and not meanwhile by another process.

    Raises:
        DataError: if there is no text to train on, or none to validate on.
        LumiereError: if the cache cannot be written.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir() / "locks" / f"{folder.name}.lock", tell):
            if folder.is_dir():
                return False
            remove_forgotten(folder.parent)
            unfinished.mkdir(exist_ok=True)
            try:
                fill_folder(unfinished, corpus, config, tell)
            finally:
                with contextlib.suppress(OSError):  # of a corpus that cannot be read, nothing is left
                    unfinished.rmdir()
            write_checksums(unfinished)
            unfinished.rename(folder)
            return True
    except OSError as error:
        raise LumiereError(
            f"the cache {str(folder)!r} cannot be written: {error.strerror}", "set LUMIERE_CACHE_DIR"
        ) from None


@contextmanager
def locked(path: Path, tell: Listener) -> Iterator[None]:
    """Inside of it, no other process builds the same; the lock goes with the process, however that ends."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        tell(Progress("waiting for another process, which encodes the same corpus"))
        lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()


def remove_forgotten(folder: Path) -> None:
    """Remove what was begun long ago and never finished, since its corpus or its config may be gone."""
    for path in folder.glob(UNFINISHED + "*"):
        last_change = max((file.stat().st_mtime for file in [path, *path.glob("*")]), default=0.0)
        if time.time() - last_change > UNFINISHED_DAYS * 86_400:
            shutil.rmtree(path, ignore_errors=True)


def fill_folder(folder: Path, corpus: Corpus, config: RunConfig, tell: Listener) -> None:
    """Everything of a corpus: `tokenizer.json`, ids and offsets of each split, and their facts in `splits.json`."""
    splits = [split for split in corpus.splits if next(corpus.parts(split), None) is not None]
    for split in ("train", "validation"):
        if split not in splits:
            shutil.rmtree(folder)
            raise DataError(
                f"the {split} split of dataset '{config.dataset.name}' holds no text",
                "check dataset.name, dataset.data_files and dataset.text_column",
            )
    if corpus.unused:
        tell(Progress(f"splits of {config.dataset.name} that are not used: {', '.join(corpus.unused)}", is_note=True))
    path = folder / "tokenizer.json"
    if not path.exists():
        settings = config.tokenizer
        tokenizer = Tokenizer.train(
            beginning(corpus.parts("train"), settings.sample_bytes),
            settings.vocab_size,
            settings.min_frequency,
            settings.normalizer,
            tell=lambda num_bytes: tell(Progress("training the tokenizer", num_bytes=num_bytes)),
        )
        write_durably(path, tokenizer.to_json())
    # From the file also where it was trained just now, so that going on gives the same.
    tokenizer = Tokenizer.load(path)
    facts = {}
    for split in splits:
        stage, total = f"encoding the {split} split", corpus.counts.get(split)

        def tell_count(facts: SplitFacts, stage: str = stage, total: int | None = total) -> None:
            tell(Progress(stage, facts.num_documents, total, facts.num_bytes))

        facts[split] = asdict(
            encode_split(folder, split, lambda split=split: corpus.parts(split), tokenizer, tell_count)
        )
    for split, rows in corpus.rows.items():
        if rows.num_empty:
            note = f"{split}: {rows.num_empty:,} of {rows.num_rows:,} rows are empty and left out"
            tell(Progress(note, is_note=True))
    write_durably(folder / "splits.json", json.dumps(facts, indent=2))
    for journal in folder.glob("*.journal"):
        journal.unlink()


def beginning(parts: Iterable[Part], num_bytes: int) -> Iterator[str]:
    """The first parts of documents, up to `num_bytes` of UTF-8, and at least one."""
    for text, _ in parts:
        yield text
        num_bytes -= len(text.encode(errors="replace"))
        if num_bytes <= 0:
            return
