"""The folders of a run's checkpoints, and the file of pointers that names them.

`step-00000512/` holds a full state, `snapshots/step-00000512/` the weights of a step. A folder is immutable once it has
its name, which is not given again: another state of the same step becomes `step-00000512-2`. `pointers.json` says which
folder `latest`, `previous` and `best` are; it is replaced atomically. So a kill at any instant leaves every checkpoint
readable. Names without a pointer may be checkpoints of format 1.
Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path

from lumiere.errors import CheckpointError, shortened
from lumiere.files import DISK, Disk, parse_json, read_file
from lumiere.persistence import format_1
from lumiere.persistence.format_1 import NAMES
from lumiere.persistence.manifest import MANIFEST_NAME, read_format

SNAPSHOTS = "snapshots"
POINTERS_NAME = "pointers.json"
MAX_POINTERS_BYTES = 10_000  # ours have 80
FOLDER_PATTERN = re.compile(r"(step-[0-9]{8,})(?:-([0-9]+))?")
TEMPORARY_PATTERN = re.compile(r"\.(?:best|latest|previous|step-[0-9]{8,}(?:-[0-9]+)?)\.[0-9a-f]{8}\.tmp")


def snapshot_name(step: int) -> str:
    """Return the name of the snapshot of a step, `step-00000512`."""
    return f"step-{step:08d}"


def checkpoint_names(folder: Path) -> list[str]:
    """Return the checkpoints in `folder`: `best`, `latest`, `previous`, then the snapshots by step.

    Raises:
        CheckpointError: The file of pointers is damaged.
    """
    found = {*read_pointers(folder), *format_1.names(folder)}
    found |= {match[1] for path in _entries(folder / SNAPSHOTS) if (match := FOLDER_PATTERN.fullmatch(path.name))}
    return [name for name in NAMES if name in found] + sorted(found - set(NAMES), key=snapshot_step)


def snapshot_step(name: str) -> int:
    """Return the step of a snapshot's name."""
    return int(name.removeprefix("step-"))


def find(folder: Path, name: str) -> Path | None:
    """Return the folder, or the file of format 1, of the checkpoint `name`; None if there is none.

    Raises:
        CheckpointError: The file of pointers is damaged.
    """
    target = read_pointers(folder).get(name)
    if target is not None:
        return folder / target
    found = [*reversed(_versions(folder / SNAPSHOTS, name)), *format_1.forms(folder, name)]
    return found[0] if found else None


def read_pointers(folder: Path) -> dict[str, str]:
    """Return the folder of each name that `pointers.json` holds; empty if it does not exist.

    Raises:
        CheckpointError: It is damaged.
    """
    path = folder / POINTERS_NAME
    try:
        pointers = parse_json(read_file(path, MAX_POINTERS_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(pointers, dict) or not set(pointers) <= set(NAMES):
        raise _damaged(path, "it is not an object with the keys best, latest and previous")
    for name, target in pointers.items():
        # Made part of a path.
        if not isinstance(target, str) or not FOLDER_PATTERN.fullmatch(target):
            raise _damaged(path, f"{name} is {shortened(str(target))!r}, not a folder such as step-00000512")
    return pointers


def place(temporary: Path, stem: str, disk: Disk = DISK) -> str:
    """Give a finished folder its name, `stem` or the next free `stem-2`; return the name.

    If a folder of that step has the same contents, that one's name is returned and the new one removed.
    """
    manifest = (temporary / MANIFEST_NAME).read_bytes()
    versions = _versions(temporary.parent, stem)
    for path in versions:
        if (path / MANIFEST_NAME).is_file() and (path / MANIFEST_NAME).read_bytes() == manifest:
            disk.remove(temporary)
            return path.name
    number = int(versions[-1].name.removeprefix(stem).lstrip("-") or 1) + 1 if versions else 1
    name = stem if number == 1 else f"{stem}-{number}"
    disk.rename(temporary, temporary.with_name(name))
    return name


def point(folder: Path, names: Collection[str], target: str, disk: Disk = DISK) -> None:
    """Make `names` point to the folder `target`, and `previous` to the latest before."""
    before = read_pointers(folder)
    after = before | dict.fromkeys(names, target)
    if "latest" in before and before["latest"] != after["latest"]:
        after["previous"] = before["latest"]
    _write_pointers(folder, after, disk)


def clear(folder: Path, disk: Disk = DISK) -> None:
    """Remove what a killed process left unfinished, and what no pointer names any more.

    Raises:
        OSError: Something cannot be removed.
        CheckpointError: The file of pointers is damaged.
    """
    for path in (*_entries(folder), *_entries(folder / SNAPSHOTS)):
        if TEMPORARY_PATTERN.fullmatch(path.name) or (re.fullmatch(r"\..+\.tmp", path.name) and not path.is_dir()):
            disk.remove(path)
    pointers = read_pointers(folder)
    # Without pointers nothing is superseded.
    for path in _entries(folder) if pointers else []:
        if FOLDER_PATTERN.fullmatch(path.name) and path.name not in pointers.values() and read_format(path) == "2":
            _remove(path, disk)
    for path in _entries(folder / SNAPSHOTS):
        match = FOLDER_PATTERN.fullmatch(path.name)
        if match and path != _versions(path.parent, match[1])[-1]:
            _remove(path, disk)
    for name in pointers:
        for number, path in enumerate(format_1.forms(folder, name)):
            if name == "latest" and number == 0 and "previous" not in pointers:
                for old in format_1.forms(folder, "previous"):
                    _remove(old, disk)
                disk.rename(path, folder / ("previous" if path.is_dir() else f"previous{format_1.SUFFIX}"))
            else:
                _remove(path, disk)


def paths_of(folder: Path, names: Collection[str]) -> list[Path]:
    """Return the files and folders that these checkpoints are, and no others.

    Raises:
        CheckpointError: The file of pointers is damaged.
    """
    pointers = read_pointers(folder)
    kept = {target for name, target in pointers.items() if name not in names}
    full = {target for name, target in pointers.items() if name in names} - kept
    others = [path for name in names for path in (*_versions(folder / SNAPSHOTS, name), *format_1.forms(folder, name))]
    return [*(folder / target for target in sorted(full)), *others]


def remove(folder: Path, names: Collection[str], disk: Disk = DISK) -> None:
    """Remove checkpoints, so that no part of one is ever found.

    Raises:
        OSError: Something cannot be removed.
        CheckpointError: The file of pointers is damaged.
    """
    paths, pointers = paths_of(folder, names), read_pointers(folder)
    if not pointers.keys().isdisjoint(names):
        _write_pointers(folder, {name: target for name, target in pointers.items() if name not in names}, disk)
    # What a pointer or a newer one hid first, so that it never appears.
    for path in reversed(paths):
        if path.exists():
            _remove(path, disk)


def temporary_path(parent: Path, name: str, token: str | None = None) -> Path:
    """Return where to make what will be `name` in `parent`; `clear` finds it."""
    return parent / f".{name}.{token or secrets.token_hex(4)}.tmp"


def _versions(parent: Path, name: str) -> list[Path]:
    """Return the folders `name`, `name-2`, ..., the newest last."""
    matches = [match for path in _entries(parent) if (match := FOLDER_PATTERN.fullmatch(path.name))]
    versions = sorted((int(match[2] or 1), match[0]) for match in matches if match[1] == name)
    return [parent / folder_name for _, folder_name in versions]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _write_pointers(folder: Path, pointers: Mapping[str, str], disk: Disk) -> None:
    disk.write(folder / POINTERS_NAME, (json.dumps(pointers) + "\n").encode())


def _remove(path: Path, disk: Disk) -> None:
    """Remove a file, or a folder under another name, so that no reader finds half of it."""
    if path.is_dir() and not path.is_symlink():
        temporary = temporary_path(path.parent, path.name.strip(".").removesuffix(".old"))
        disk.rename(path, temporary)
        path = temporary
    disk.remove(path)


def _damaged(path: Path, reason: str) -> CheckpointError:
    hint = 'restore it, for example {"latest": "step-00000512"} with the name of a folder beside it'
    return CheckpointError(f"{str(path)!r} is damaged: {reason}", hint)
