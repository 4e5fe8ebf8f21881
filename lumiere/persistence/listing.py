"""`transfer.json`: what a run at another place consists of. It is written last, so that a run with it is complete.

It has every file with its length and SHA-256, and the folder of every checkpoint. Only names of a run's known layout
are accepted. Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lumiere.errors import CheckpointError, LumiereError, TransferError, nearest, shortened
from lumiere.files import parse_json
from lumiere.persistence import format_1, lenses, notes
from lumiere.persistence.manifest import FILE_PATTERN, MANIFEST_NAME
from lumiere.persistence.step_folders import FOLDER_PATTERN, NAMES, POINTERS_NAME, SNAPSHOTS, snapshot_name

LISTING_NAME = "transfer.json"
FORMAT_NUMBER = "1"
MAX_LISTING_BYTES = 20_000_000  # a file takes 200 bytes
ROOT_NAMES = ("config.yaml", "tokenizer.json", "tokenizer_config.json", "run.json", "metrics.jsonl", notes.NOTES_NAME)
CHECKPOINTS = "checkpoints"
POINTERS = f"{CHECKPOINTS}/{POINTERS_NAME}"
"""Derived from the listing's checkpoints, therefore not among its files."""

STEP = "step-[0-9]{8,18}"
CHECKPOINT_NAME = re.compile(rf"(?:{'|'.join(NAMES)}|{STEP})")
CHECKPOINT_PATH = re.compile(
    rf"(?:{SNAPSHOTS}/)?{STEP}(?:-[0-9]{{1,9}})?|{CHECKPOINT_NAME.pattern}(?:{re.escape(format_1.SUFFIX)})?"
)
EVALUATION = re.compile(rf"{notes.FOLDER}/(?!\.){notes.NAME_PATTERN.pattern}{re.escape(notes.SUFFIX)}")
LENS = re.compile(rf"{lenses.FOLDER}/{lenses.FILE_PATTERN.pattern}")
HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """A file: its path in the run's folder with slashes, its length and its SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Listing:
    """Contents of `transfer.json`.

    Attributes:
        run: Full name of the run.
        checkpoints: Folder, or file of format 1, of each checkpoint, below `checkpoints`.
        files: By name.
    """

    run: str
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Entry] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        values = {
            "lumiere_transfer": FORMAT_NUMBER,
            "run": self.run,
            "checkpoints": dict(self.checkpoints),
            "files": [asdict(entry) for entry in self.files.values()],
        }
        return (json.dumps(values, indent=1) + "\n").encode()

    def pointers(self) -> bytes | None:
        """Return the text of `pointers.json`; None if no checkpoint needs it."""
        targets = {
            name: path for name, path in self.checkpoints.items() if name in NAMES and FOLDER_PATTERN.fullmatch(path)
        }
        return (json.dumps(targets) + "\n").encode() if targets else None

    def only(self, wanted: Collection[str]) -> Listing:
        """Return the listing with the wanted checkpoints alone; all of them if none is named.

        Raises:
            CheckpointError: There is no such checkpoint.
        """
        chosen = choose(f"run {self.run}", self.checkpoints, wanted)
        checkpoints = {name: path for name, path in self.checkpoints.items() if name in chosen}
        paths = set(checkpoints.values())
        files = {name: entry for name, entry in self.files.items() if checkpoint_path(name) in {None, *paths}}
        return Listing(self.run, checkpoints, files)


def choose(where: str, available: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Return the wanted checkpoints among the available ones: names, steps, or `snapshots` for all of these.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    available, chosen = list(available), []
    for word in wanted:
        name = snapshot_name(int(word)) if re.fullmatch("[0-9]{1,18}", word) else word
        found = [other for other in available if other == name or (word == SNAPSHOTS and other.startswith("step-"))]
        if not found:
            guess = nearest(word, available)
            has = f"it has {', '.join(available)}" if available else "it has none"
            raise CheckpointError(
                f"{where} has no checkpoint {word!r}", has + (f"; did you mean {guess}?" if guess else "")
            )
        chosen += found
    return [name for name in available if name in chosen] if wanted else available


def checkpoint_path(name: str) -> str | None:
    """Return the checkpoint, as in `Listing.checkpoints`, that a file belongs to; None for the run's other files."""
    folder, _, rest = name.partition("/")
    if folder != CHECKPOINTS:
        return None
    return rest if rest.endswith(format_1.SUFFIX) and "/" not in rest else rest.rpartition("/")[0]


def is_known(name: str) -> bool:
    """Return whether a run may have a file of this name."""
    if name in ROOT_NAMES or EVALUATION.fullmatch(name) or LENS.fullmatch(name):
        return True
    path = checkpoint_path(name)
    if path is None or not CHECKPOINT_PATH.fullmatch(path):
        return False
    file = name.removeprefix(f"{CHECKPOINTS}/{path}")
    if path.endswith(format_1.SUFFIX):
        return file == ""
    return file == f"/{MANIFEST_NAME}" or FILE_PATTERN.fullmatch(file.removeprefix("/")) is not None


def parse_listing(data: bytes, run: str, where: str, is_whole: bool = True) -> Listing:
    """Return the listing in a text that anyone may have written.

    Args:
        run: Name of the run that it must describe.
        where: Its place, for messages.
        is_whole: Whether it must have the files of its checkpoints, and of no others.

    Raises:
        TransferError: It is not a listing of that run, or names what is no file of a run.
        LumiereError: A newer Lumiere wrote it.
    """
    try:
        values = parse_json(data)
    except ValueError as error:
        raise damaged(where, f"{LISTING_NAME} is not JSON: {error}") from None
    number = values.get("lumiere_transfer") if isinstance(values, dict) else None
    if not isinstance(number, str):
        raise damaged(where, f"{LISTING_NAME} does not describe a run")
    if number != FORMAT_NUMBER:
        raise LumiereError(
            f"{where} has format {shortened(number, 20)!r}; this Lumiere reads format {FORMAT_NUMBER}",
            "a newer Lumiere wrote it: update this one, with git pull in its checkout",
        )
    if values.get("run") != run:
        raise damaged(where, f"{LISTING_NAME} describes another run")
    try:
        entries = [Entry(item["name"], item["bytes"], item["sha256"]) for item in values["files"]]
        checkpoints = dict(values["checkpoints"])
    except (KeyError, TypeError, ValueError):
        raise damaged(where, f"{LISTING_NAME} does not list files and checkpoints") from None
    for entry in entries:
        if not isinstance(entry.name, str) or not is_known(entry.name):
            raise damaged(where, f"{shortened(str(entry.name))!r} is no file of a run")
        if type(entry.bytes) is not int or entry.bytes < 0 or not _matches(HASH, entry.sha256):
            raise damaged(where, f"{entry.name} has no length or no hash")
    files = {entry.name: entry for entry in entries}
    paths = {checkpoint_path(name) for name in files} - {None}
    sound = len(files) == len(entries) and all(_is_checkpoint(*pair) for pair in checkpoints.items())
    if not sound or (is_whole and paths != set(checkpoints.values())):
        raise damaged(where, "its files are not those of its checkpoints")
    return Listing(run, checkpoints, files)


def damaged(where: str, reason: str) -> TransferError:
    """Return the error for a run at another place that is not what its listing says, or should say."""
    return TransferError(f"{where} is damaged: {reason}", "push the run again from where it is whole")


def _is_checkpoint(name: Any, path: Any) -> bool:
    """Return whether a checkpoint of that name may be at that path."""
    if not _matches(CHECKPOINT_NAME, name) or not _matches(CHECKPOINT_PATH, path):
        return False
    if name in NAMES:
        return bool(FOLDER_PATTERN.fullmatch(path)) or path.removesuffix(format_1.SUFFIX) == name
    return re.fullmatch(rf"(?:{SNAPSHOTS}/)?{name}(?:-[0-9]+|{re.escape(format_1.SUFFIX)})?", path) is not None


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
