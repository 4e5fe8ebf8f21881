"""Checkpoints of format 1, which Lumiere wrote before step folders.

A checkpoint is a file such as `best.safetensors`, with the metadata in its header and a hash of each group of tensors;
or, from several processes, a folder such as `best/` with a manifest. Files and folders were replaced in place, the old
one being moved aside to `.best.old`, where a kill may have left it.
Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.files import parse_json
from lumiere.persistence.manifest import check_format, damaged, item_size, read_format
from lumiere.persistence.tensor_files import check_memory, hash_tensors, open_safetensors

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
NAMES = ("best", "latest", "previous")
SNAPSHOT = re.compile(r"(step-[0-9]{8,})(\.safetensors)?")


def forms(folder: Path, name: str) -> list[Path]:
    """Return the files and folders in `folder` that are the checkpoint `name` of format 1; the first one counts."""
    paths = [folder / f"{stem}{suffix}" for stem in (name, f".{name}.old") for suffix in (SUFFIX, "")]
    return [path for path in paths if (path.is_file() if path.suffix == SUFFIX else _is_folder(path))]


def names(folder: Path) -> set[str]:
    """Return the names of the checkpoints of format 1 in `folder`."""
    snapshots = {match[1] for path in folder.glob("step-*") if (match := SNAPSHOT.fullmatch(path.name))}
    return {name for name in (*NAMES, *snapshots) if forms(folder, name)}


def load_file(path: Path, groups: Collection[str]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read the metadata and the named groups of tensors, verified by their hashes, to the CPU.

    Raises:
        CheckpointError: The file does not exist, is damaged, or Lumiere did not write it.
    """
    with open_safetensors(path) as file:
        texts = file.metadata() or {}
        metadata, tensors = _parse_metadata(path, texts), {}
        names = {group: [name for name in file.keys() if name.startswith(f"{group}.")] for group in groups}  # noqa: SIM118
        slices = [file.get_slice(name) for group in groups for name in names[group]]
        check_memory(path, [item_size(part.get_dtype()) * math.prod(part.get_shape()) for part in slices])
        for group in groups:
            # Cloned, because safetensors maps the file.
            tensors[group] = {name.removeprefix(f"{group}."): file.get_tensor(name).clone() for name in names[group]}
            if hash_tensors(tensors[group]) != texts.get(f"sha256.{group}"):
                raise damaged(path, f"the {group}'s tensors do not match their hash")
    return metadata, tensors


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file; loads no torch.

    Raises:
        CheckpointError: As `load_file`, as far as the header shows it.
    """
    with open_safetensors(path, framework="numpy") as file:
        return _parse_metadata(path, file.metadata() or {})


def _is_folder(path: Path) -> bool:
    """Return whether a folder is a checkpoint of format 1. A step folder of format 2 may have a snapshot's name."""
    return path.is_dir() and (not path.name.startswith("step-") or read_format(path) == "1")


def _parse_metadata(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    check_format(path, texts.get("lumiere_format"), ("1",))
    text = texts.get("metadata", "")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    if texts.get("format") != "pt" or digest != texts.get("sha256.metadata"):
        raise damaged(path, "its metadata does not match its hash")
    try:
        metadata = parse_json(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise damaged(path, "its metadata is not a JSON object")
    return metadata
