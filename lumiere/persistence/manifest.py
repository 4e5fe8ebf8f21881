"""What is in a folder of shards: one JSON file beside them, which says where the rows of each tensor are.

`checkpoint.json` holds what a single file has in its header, every file with its length and SHA-256, every tensor with
its type, shape and shards, and a hash of itself. Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lumiere.errors import CheckpointError, shortened
from lumiere.files import parse_json, read_file
from lumiere.persistence.checkpoint import (
    DAMAGE_HINT,
    FORMAT_NUMBER,
    GROUPS,
    MAX_HEADER_BYTES,
    check_format,
    damaged,
    unreadable,
)

MANIFEST_NAME = "checkpoint.json"
MAX_BYTES = 10_000_000  # ours have some kB, and a dozen bytes a shard; reading as many takes seconds
MAX_DIMENSIONS = 8  # ours have two
FILE_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


class Shard(NamedTuple):
    """Some rows of a tensor: which file holds them, the first one, and the one after the last.

    A tensor without dimensions is one row.
    """

    file: int
    start: int
    end: int


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor, its type in the words of safetensors, and its shards, from the first row to the last."""

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def shard_shape(self, shard: Shard) -> list[int]:
        """The shape that a shard has in its file."""
        return [shard.end - shard.start, *self.shape[1:]] if self.shape else []


@dataclass(frozen=True)
class ShardFile:
    """A safetensors file of the folder."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a folder of shards without reading one.

    Attributes:
        metadata: as in `Checkpoint`.
        files: the shards' files; each one has tensors of one group.
        tensors: by full name, as in `model.embedding.weight`.
    """

    metadata: dict[str, Any]
    files: tuple[ShardFile, ...]
    tensors: dict[str, ShardedTensor]

    def to_bytes(self) -> bytes:
        """The text of the file.

        Raises:
            ValueError: the metadata holds NaN or infinity.
        """
        contents = {
            "lumiere_format": str(FORMAT_NUMBER),
            "metadata": self.metadata,
            "files": [{"name": file.name, "bytes": file.num_bytes, "sha256": file.sha256} for file in self.files],
            "tensors": {
                name: {"dtype": tensor.dtype, "shape": tensor.shape, "shards": tensor.shards}
                for name, tensor in self.tensors.items()
            },
        }
        # As it will be read: a key that is a number has become text, a tuple a list.
        contents = json.loads(json.dumps(contents, allow_nan=False))
        return (json.dumps(contents | {"sha256": _hash(contents)}) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder whose files are all there, each as long as it should be; none of them is read.

    Raises:
        CheckpointError: there is no such folder, it is none of ours, or it is damaged.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.is_symlink():
            raise damaged(folder, f"{MANIFEST_NAME} is a link")
        manifest = _parse(folder, read_file(path, MAX_BYTES))
        _check_files(folder, manifest)
    except FileNotFoundError:
        if not folder.is_dir():
            raise CheckpointError(f"no checkpoint {str(folder)!r}", "lumiere runs ls lists the runs") from None
        raise CheckpointError(f"{str(folder)!r} is no checkpoint: it has no {MANIFEST_NAME}", DAMAGE_HINT) from None
    except OSError as error:
        raise unreadable(folder, error) from None
    return manifest


def _parse(folder: Path, data: bytes) -> Manifest:
    try:
        contents = parse_json(data)
    except ValueError:
        contents = None
    if not isinstance(contents, dict):
        raise damaged(folder, f"{MANIFEST_NAME} is no JSON object")
    if "lumiere_format" not in contents:
        raise CheckpointError(f"{str(folder)!r} is no checkpoint of Lumiere", DAMAGE_HINT)
    check_format(folder, contents["lumiere_format"])
    digest = contents.pop("sha256", None)
    if digest != _hash(contents):
        raise damaged(folder, f"{MANIFEST_NAME} does not match its hash")
    manifest = _manifest_of(contents)
    if manifest is None:
        raise damaged(folder, f"{MANIFEST_NAME} does not say what files there are, and which tensors")
    for name, tensor in manifest.tensors.items():
        ends = [0, *(shard.end for shard in tensor.shards)]
        starts = [*(shard.start for shard in tensor.shards), tensor.num_rows]
        if ends != starts or any(shard.start >= shard.end for shard in tensor.shards):
            raise damaged(folder, f"the shards of {shortened(name)} overlap or leave gaps")
    return manifest


def _manifest_of(contents: Mapping[str, Any]) -> Manifest | None:
    try:
        manifest = Manifest(
            metadata=contents["metadata"],
            files=tuple(ShardFile(file["name"], file["bytes"], file["sha256"]) for file in contents["files"]),
            tensors={
                name: ShardedTensor(
                    entry["dtype"], tuple(entry["shape"]), tuple(Shard(*shard) for shard in entry["shards"])
                )
                for name, entry in contents["tensors"].items()
            },
        )
        return manifest if _is_sound(manifest) else None
    except (KeyError, TypeError, AttributeError, IndexError):
        return None


def _is_sound(manifest: Manifest) -> bool:
    """Whether all values are of the types and in the ranges that they should be."""
    names = [file.name for file in manifest.files]
    sound = isinstance(manifest.metadata, dict) and len(set(names)) == len(names)
    for file in manifest.files:
        sound &= isinstance(file.name, str) and bool(FILE_PATTERN.fullmatch(file.name))
        sound &= _is_count(file.num_bytes) and isinstance(file.sha256, str)
    groups: dict[int, str] = {}
    for name, tensor in manifest.tensors.items():
        group = name.partition(".")[0]
        sound &= group in GROUPS and isinstance(tensor.dtype, str) and len(tensor.shape) <= MAX_DIMENSIONS
        sound &= all(map(_is_count, tensor.shape))
        for shard in tensor.shards:
            sound &= all(map(_is_count, shard)) and shard.file < len(names)
            sound &= groups.setdefault(shard.file, group) == group
    return sound


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_files(folder: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        try:
            status = (folder / file.name).lstat()
        except FileNotFoundError:
            raise damaged(folder, f"{file.name} is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise damaged(folder, f"{file.name} is no file")
        if status.st_size != file.num_bytes:
            raise damaged(folder, f"{file.name} has {status.st_size:,} bytes instead of {file.num_bytes:,}")
    # Other readers of such folders, torch's among them, take all that are there.
    strangers = {path.name for path in folder.glob("*.safetensors")} - {file.name for file in manifest.files}
    if strangers:
        raise damaged(folder, f"{shortened(min(strangers))} does not belong there")


def check_lengths(folder: Path, manifest: Manifest, item_sizes: Mapping[str, int]) -> None:
    """Refuses files that are shorter than their tensors, or so much longer that a header does not explain it.

    Args:
        item_sizes: bytes of a number of each type.
    """
    lengths = [0] * len(manifest.files)
    for tensor in manifest.tensors.values():
        for shard in tensor.shards:
            lengths[shard.file] += math.prod(tensor.shard_shape(shard)) * item_sizes[tensor.dtype]
    for file, length in zip(manifest.files, lengths, strict=True):
        if not length <= file.num_bytes <= length + 8 + MAX_HEADER_BYTES:
            raise damaged(folder, f"{file.name} has {file.num_bytes:,} bytes, its tensors {length:,}")


def hash_file(file: BinaryIO) -> str:
    """The SHA-256 of all that `file` gives from where it stands to its end."""
    digest = hashlib.sha256()
    while data := file.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


def _hash(contents: Mapping[str, Any]) -> str:
    """Of the values, however the text is laid out."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
