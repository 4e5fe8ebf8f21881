"""What people write about a run: tags and a note, in `notes.json` in the run's folder.

A file of their own, because the training process rewrites `run.json` at any moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lumiere.errors import LumiereError, nearest
from lumiere.files import parse_json, read_file
from lumiere.persistence.atomic import write_atomically
from lumiere.persistence.metrics import to_json
from lumiere.persistence.runs import Run

FILE_NAME = "notes.json"
MAX_BYTES = 1_000_000
TAG_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,40}")


@dataclass(frozen=True)
class Notes:
    """Tags in the order in which they were given, and a text, which may be empty."""

    tags: tuple[str, ...] = ()
    text: str = ""


def read_notes(run: Run) -> Notes:
    """The notes of a run; what is missing or damaged counts as not written."""
    try:
        return _parse(read_file(run.path / FILE_NAME, MAX_BYTES))
    except (OSError, ValueError):
        return Notes()


def add_tags(run: Run, tags: Iterable[str]) -> Notes:
    """Gives a run tags; those that it has already stay where they are.

    Raises:
        LumiereError: one is not a tag, or the notes cannot be read or written.
    """
    tags = list(tags)
    for tag in tags:
        check_tag(tag)
    notes = _read_to_change(run)
    return _write(run, Notes(tuple(dict.fromkeys([*notes.tags, *tags])), notes.text))


def remove_tags(run: Run, tags: Iterable[str]) -> Notes:
    """Takes tags from a run.

    Raises:
        LumiereError: the run does not have one of them, or the notes cannot be read or written.
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
    """Sets the note of a run; an empty text removes it.

    Raises:
        LumiereError: the text is not valid Unicode, or the notes cannot be read or written.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LumiereError(
            f"the note is not valid text (character {error.start + 1})", "write it in a terminal that speaks UTF-8"
        ) from None
    return _write(run, Notes(_read_to_change(run).tags, text.strip()))


def check_tag(tag: str) -> None:
    """Refuses what is not a tag.

    Raises:
        LumiereError: it is empty, too long, or has other characters.
    """
    if not TAG_PATTERN.fullmatch(tag):
        raise LumiereError(f"{tag!a} is not a tag", "a tag is 1 to 40 letters, digits, dots, hyphens and underscores")


def _parse(data: bytes) -> Notes:
    """Raises ValueError where the file is not ours; single values that are not are left out."""
    values = parse_json(data)
    if not isinstance(values, dict):
        raise ValueError("not an object")
    tags, text = values.get("tags"), values.get("note")
    listed = tags if isinstance(tags, list) else []
    sound = dict.fromkeys(tag for tag in listed if isinstance(tag, str) and TAG_PATTERN.fullmatch(tag))
    return Notes(tuple(sound), text if isinstance(text, str) else "")


def _read_to_change(run: Run) -> Notes:
    path = run.path / FILE_NAME
    try:
        return _parse(read_file(path, MAX_BYTES))
    except FileNotFoundError:
        return Notes()
    except OSError as error:
        raise LumiereError(f"{str(path)!r} cannot be read: {error.strerror}", "check its permissions") from None
    except ValueError:
        raise LumiereError(f"{str(path)!r} is damaged", "mend or delete it; it holds the run's tags and note") from None


def _write(run: Run, notes: Notes) -> Notes:
    path = run.path / FILE_NAME
    values = {"tags": list(notes.tags), "note": notes.text}
    try:
        write_atomically(path, (to_json(values, indent=2) + "\n").encode())
    except OSError as error:
        raise LumiereError(f"{str(path)!r} cannot be written: {error.strerror}", "check the folder") from None
    return notes
