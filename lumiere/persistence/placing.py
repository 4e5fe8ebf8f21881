"""Where the checkpoints of a run are, as files or as folders, and how one takes the place of another.

`latest` is the file `latest.safetensors` or the folder `latest/`. A folder cannot be replaced in one step: what is
called `latest` first steps aside, to `.latest.old`, and is found there as long as nothing else is called `latest`. So
every checkpoint can be loaded at every instant, and also after a kill between any two steps. Loads no torch.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from lumiere.files import sync_folder

SUFFIX = ".safetensors"
NAME_PATTERN = re.compile(r"best|latest|previous|step-[0-9]{8,}")
ENTRY_PATTERN = re.compile(
    rf"(?:(?P<name>{NAME_PATTERN.pattern})|\.(?P<aside>{NAME_PATTERN.pattern})\.old)(?:\.safetensors)?"
)
TEMPORARY_PATTERN = re.compile(rf"\.(?:{NAME_PATTERN.pattern})\.[0-9a-f]{{8}}\.tmp")


def find(folder: Path, name: str) -> Path:
    """The file or folder of the checkpoint `name`; where there is none, the file that it would be."""
    # A second look, because it may have stepped aside, and another one may have come, while we looked.
    paths = present(folder, name) or present(folder, name)
    return paths[0] if paths else folder / f"{name}{SUFFIX}"


def found(folder: Path) -> set[str]:
    """The names of the checkpoints in `folder`, by its listing."""
    try:
        with os.scandir(folder) as entries:
            return {
                match["name"] or match["aside"]
                for entry in entries
                if (match := ENTRY_PATTERN.fullmatch(entry.name))
                and (entry.name.endswith(SUFFIX) or os.path.isdir(entry.path))
            }
    except OSError:
        return set()


def present(folder: Path, name: str) -> list[Path]:
    """The forms in which a checkpoint is there; the first one counts, the others are hidden behind it."""
    return [
        path for path in _forms(folder, name) if (os.path.lexists(path) if path.suffix == SUFFIX else path.is_dir())
    ]


def is_there(folder: Path, name: str) -> bool:
    """Whether there is a checkpoint `name` that is a file or a folder, as it should be, and no pipe or broken link."""
    path = find(folder, name)
    return path.is_file() if path.suffix == SUFFIX else path.is_dir()


def temporary_path(path: Path) -> Path:
    """Where to make what shall be at `path`; `clear` finds it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def clear(folder: Path) -> None:
    """Removes what a process has left that was killed while it saved, and gives asides their names back.

    Raises:
        OSError: something cannot be removed.
    """
    for path in list(folder.glob(".*.tmp")):
        if not path.is_dir() or TEMPORARY_PATTERN.fullmatch(path.name):
            delete(path)
    for path in sorted(folder.glob(".*.old*")):
        match = ENTRY_PATTERN.fullmatch(path.name)
        if match is None or path not in present(folder, match["aside"]):
            continue
        if find(folder, match["aside"]) == path:
            os.rename(path, _form_of(path, folder, match["aside"]))
        else:
            delete(path)


def place(finished: Path, folder: Path, name: str, old_name: str | None = None) -> None:
    """Gives `finished`, a whole checkpoint in `folder`, the name `name`.

    In this order a checkpoint can be loaded under `name` and under `old_name` at every instant, and where only one of
    them is whole, it goes when the new one is there.

    Args:
        old_name: what the checkpoint that had the name is called from now on; None if it goes.

    Raises:
        OSError: as renaming does.
    """
    aside = _step_aside(folder, name)
    os.rename(finished, _form_of(finished, folder, name))
    sync_folder(folder)
    if aside is not None and old_name is not None:
        place(aside, folder, old_name)
    elif aside is not None:
        delete(aside)
        sync_folder(folder)


def remove(folder: Path, name: str) -> None:
    """Deletes the checkpoint `name`, if it is there, so that no part of it is ever found.

    Raises:
        OSError: as deleting does.
    """
    # What is hidden first, so that it never comes to light.
    for path in reversed(present(folder, name)):
        if path.suffix == SUFFIX:
            path.unlink(missing_ok=True)
        else:
            temporary = temporary_path(folder / name)
            os.rename(path, temporary)
            delete(temporary)


def delete(path: Path) -> None:
    """Deletes a file, a folder with all that is in it, or a link, and never what that leads to.

    Raises:
        OSError: as deleting does.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _step_aside(folder: Path, name: str) -> Path | None:
    """Takes the name from what has it, and gives the path where it is now; None where nothing is called so."""
    paths = present(folder, name)
    if not paths:
        return None
    first, *hidden = paths
    for path in hidden:
        delete(path)
    if first in _forms(folder, name)[:2]:
        aside = folder / f".{name}.old{SUFFIX if first.suffix == SUFFIX else ''}"
        os.rename(first, aside)
        return aside
    return first


def _forms(folder: Path, name: str) -> list[Path]:
    # The file before the folder: a Lumiere that does not know of folders may have gone on with the run.
    return [folder / f"{stem}{suffix}" for stem in (name, f".{name}.old") for suffix in (SUFFIX, "")]


def _form_of(path: Path, folder: Path, name: str) -> Path:
    """The path of `name` for what is a folder, or a file, at `path`."""
    return folder / (name if path.is_dir() else f"{name}{SUFFIX}")
