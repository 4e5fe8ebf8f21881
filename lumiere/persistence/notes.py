"""Notes and evaluations stored with a run: `notes.json` and `eval/*.json`.

They are separate files because the training process may rewrite `run.json` at any time: a run can be annotated and
evaluated while another process trains it. Importing this module loads no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumiere.errors import LumiereError, nearest, printable
from lumiere.files import parse_json, read_file, writing
from lumiere.persistence.metrics import as_number, to_json
from lumiere.persistence.runs import Run

NOTES_NAME = "notes.json"
MAX_NOTES_BYTES = 1_000_000
HINT = "make room or check the folder"
TAG_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,40}")


@dataclass(frozen=True)
class Notes:
    """Tags in the order in which they were added, and a text, which may be empty."""

    tags: tuple[str, ...] = ()
    text: str = ""


def read_notes(run: Run) -> Notes:
    """Return the notes of a run; empty if they are missing or damaged."""
    try:
        return _parse(read_file(run.path / NOTES_NAME, MAX_NOTES_BYTES))
    except (OSError, ValueError):
        return Notes()


def add_tags(run: Run, tags: Iterable[str]) -> Notes:
    """Add tags to a run; those that it has already keep their place.

    Raises:
        LumiereError: One is not a tag, or the notes cannot be read or written.
    """
    tags = list(tags)
    for tag in tags:
        check_tag(tag)
    notes = _read_to_change(run)
    return _write(run, Notes(tuple(dict.fromkeys([*notes.tags, *tags])), notes.text))


def remove_tags(run: Run, tags: Iterable[str]) -> Notes:
    """Remove tags from a run.

    Raises:
        LumiereError: The run does not have one of them, or the notes cannot be read or written.
    """
    tags = list(tags)
    notes = _read_to_change(run)
    for tag in tags:
        if tag not in notes.tags:
            guess = nearest(tag, notes.tags)
            has = f"it has {', '.join(notes.tags)}" if notes.tags else "it has none"
            raise LumiereError(f"run {run.id} has no tag {tag!a}", has + (f"; did you mean {guess}?" if guess else ""))
    return _write(run, Notes(tuple(tag for tag in notes.tags if tag not in tags), notes.text))


def write_note(run: Run, text: str) -> Notes:
    """Set the note of a run; an empty text removes it.

    Raises:
        LumiereError: The text is not valid Unicode, or the notes cannot be read or written.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LumiereError(
            f"the note is not valid text (character {error.start + 1})", "write it in a terminal that uses UTF-8"
        ) from None
    return _write(run, Notes(_read_to_change(run).tags, text.strip()))


def check_tag(tag: str) -> None:
    """Check that a text is a tag.

    Raises:
        LumiereError: It is empty, too long, or has other characters.
    """
    if not TAG_PATTERN.fullmatch(tag):
        raise LumiereError(f"{tag!a} is not a tag", "a tag is 1 to 40 letters, digits, dots, hyphens and underscores")


def _parse(data: bytes) -> Notes:
    """Return the notes in a file without its invalid values; raise ValueError if it is not a JSON object."""
    values = parse_json(data)
    if not isinstance(values, dict):
        raise ValueError("not an object")
    tags, text = values.get("tags"), values.get("note")
    listed = tags if isinstance(tags, list) else []
    sound = dict.fromkeys(tag for tag in listed if isinstance(tag, str) and TAG_PATTERN.fullmatch(tag))
    return Notes(tuple(sound), text if isinstance(text, str) else "")


def _read_to_change(run: Run) -> Notes:
    path = run.path / NOTES_NAME
    try:
        return _parse(read_file(path, MAX_NOTES_BYTES))
    except FileNotFoundError:
        return Notes()
    except OSError as error:
        raise LumiereError(f"{str(path)!r} cannot be read: {error.strerror}", "check its permissions") from None
    except ValueError:
        raise LumiereError(
            f"{str(path)!r} is damaged", "repair or delete it; it holds the run's tags and note"
        ) from None


def _write(run: Run, notes: Notes) -> Notes:
    path = run.path / NOTES_NAME
    values = {"tags": list(notes.tags), "note": notes.text}
    with writing(path, HINT):
        run.disk.write(path, (to_json(values, indent=2) + "\n").encode())
    return notes


FOLDER = "eval"
SUFFIX = ".json"
MAX_EVALUATION_BYTES = 50_000_000  # some hundred thousand documents
MAX_FILES = 1000
NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,200}")
FIGURES = ("loss", "perplexity", "bits_per_byte", "word_perplexity", "accuracy")


@dataclass(frozen=True)
class KeptEvaluation:
    """The main numbers of a stored evaluation; None for what its file lacks.

    Attributes:
        name: Of the file, without its suffix.
        protocol: `windows`, or `stride-<N>`.
        figures: Those of `FIGURES`.
        problem: Why the file cannot be read.
    """

    name: str
    checkpoint: str | None = None
    step: int | float | None = None
    corpus: str | None = None
    corpus_sha256: str | None = None
    protocol: str | None = None
    figures: Mapping[str, int | float | None] | None = None
    problem: str | None = None


def evaluation_name(checkpoint: str, corpus: str, corpus_sha256: str, protocol: str) -> str:
    """Return the name of a stored evaluation. A later one of the same text by the same protocol replaces it."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(corpus)).strip("-.")[:60]
    return f"{checkpoint}-{readable or 'text'}-{corpus_sha256[:8]}-{protocol}"


def save_evaluation(run: Run, name: str, values: Mapping[str, Any]) -> Path:
    """Store an evaluation atomically; replace an older one of the same name.

    Raises:
        LumiereError: It cannot be written, or `eval` is a link, which could lead out of the run's folder.
        ValueError: `name` is not a valid file name.
    """
    if not NAME_PATTERN.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name!r} is not a valid name for an evaluation")
    folder = run.path / FOLDER
    path = folder / f"{name}{SUFFIX}"
    if folder.is_symlink():
        raise LumiereError(f"{str(folder)!r} is a link", "remove it: evaluations are stored in the run's own folder")
    with writing(path, HINT):
        folder.mkdir(exist_ok=True)
        run.disk.write(path, (to_json(values) + "\n").encode())
    return path


def read_evaluations(run: Run) -> list[KeptEvaluation]:
    """Return the stored evaluations of a run by name, at most `MAX_FILES`."""
    folder = run.path / FOLDER
    try:
        names = sorted(entry for entry in os.listdir(folder) if entry.endswith(SUFFIX) and not entry.startswith("."))
    except OSError:  # there is none
        return []
    return [_read_evaluation(folder / name) for name in names[:MAX_FILES]]


def _read_evaluation(path: Path) -> KeptEvaluation:
    name = printable(path.name.removesuffix(SUFFIX))
    try:
        values = parse_json(read_file(path, MAX_EVALUATION_BYTES))
    except OSError as error:
        return KeptEvaluation(name, problem=error.strerror or str(error))
    except ValueError as error:
        return KeptEvaluation(name, problem=printable(str(error)))
    if not isinstance(values, dict):
        return KeptEvaluation(name, problem="it is not an evaluation")
    texts = {key: values.get(key) for key in ("checkpoint", "corpus", "corpus_sha256", "protocol")}
    return KeptEvaluation(
        name,
        **{key: value for key, value in texts.items() if isinstance(value, str)},
        step=as_number(values.get("step")),
        figures={key: as_number(values.get(key)) for key in FIGURES},
    )
