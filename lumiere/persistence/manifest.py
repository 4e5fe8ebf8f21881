"""`checkpoint.json`: what is in the folder of a checkpoint.

It holds the metadata, every safetensors file with its length and SHA-256, every tensor with its type, its shape and the
files that hold its rows, and a hash of itself. Format 1 has it in folders of shards only.
Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lumiere.errors import CheckpointError, shortened
from lumiere.files import parse_json, read_file

FORMAT_NUMBER = 2
GROUPS = ("model", "optimizer", "rng")
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""The types of a checkpoint's tensors: safetensors' name, and torch's."""

MANIFEST_NAME = "checkpoint.json"
MAX_BYTES = 10_000_000  # ours have some kB, plus a dozen bytes per shard
MAX_HEADER_BYTES = 10_000_000  # ours have some kB; the format allows ten times as many, which take gigabytes as JSON
MAX_DIMENSIONS = 8  # ours have two
FILE_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
DAMAGE_HINT = "use another checkpoint of the run: best, latest, previous, or a step's"


def damaged(path: Path, reason: str) -> CheckpointError:
    """Return the error for a checkpoint whose contents have changed since they were written."""
    return CheckpointError(f"{str(path)!r} is damaged: {reason}", DAMAGE_HINT)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a checkpoint that exists and cannot be read."""
    return CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}", "check the path")


def missing(path: Path) -> CheckpointError:
    """Return the error for a checkpoint that does not exist."""
    return CheckpointError(f"no checkpoint {str(path)!r}", "lumiere runs ls lists the runs")


def check_format(path: Path, number: Any, formats: tuple[str, ...]) -> None:
    """Check that a checkpoint has one of `formats`.

    Raises:
        CheckpointError: It has another format, or Lumiere did not write it.
    """
    if not isinstance(number, str):
        raise CheckpointError(
            f"{str(path)!r} is not a Lumiere checkpoint", "Lumiere's are in the checkpoints folder of a run"
        )
    if number not in formats:
        is_newer = re.fullmatch("[1-9][0-9]*", number)
        raise CheckpointError(
            f"{str(path)!r} has format {shortened(number, 20)!r}; this Lumiere reads formats 1 to {FORMAT_NUMBER}",
            "a newer Lumiere wrote it: update this one, with git pull in its checkout" if is_newer else DAMAGE_HINT,
        )


class Shard(NamedTuple):
    """Consecutive rows of a tensor in one file. A tensor without dimensions is one row.

    Attributes:
        file: Index of the file.
        start: First row.
        end: Row after the last.
    """

    file: int
    start: int
    end: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor: its type in safetensors' terms, its shape, and its shards in the order of their rows."""

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * item_size(self.dtype)

    def shard_shape(self, shard: Shard) -> list[int]:
        """Return the shape of a shard in its file."""
        return [shard.end - shard.start, *self.shape[1:]] if self.shape else []


@dataclass(frozen=True)
class FileEntry:
    """A safetensors file of the folder.

    Attributes:
        prefix: What the names of its tensors lack in the file: `model.` in `model.safetensors`.
    """

    name: str
    bytes: int
    sha256: str
    prefix: str = ""


@dataclass(frozen=True)
class Manifest:
    """Contents of `checkpoint.json`.

    Attributes:
        metadata: As in `Checkpoint`.
        tensors: By full name, such as `model.token_embedding.weight`.
    """

    metadata: dict[str, Any]
    files: tuple[FileEntry, ...]
    tensors: dict[str, TensorEntry]

    def to_bytes(self) -> bytes:
        """Return the text of the file.

        Raises:
            ValueError: The metadata holds NaN or infinity, which JSON does not have.
        """
        text = json.dumps({"lumiere_format": str(FORMAT_NUMBER), **asdict(self)}, allow_nan=False)
        # The hash is over the values as they will be read: integer keys become text, tuples lists.
        contents = json.loads(text)
        return (json.dumps(contents | {"sha256": _hash(contents)}) + "\n").encode()


def item_size(dtype: str) -> int:
    """Return the bytes of a number of a type in safetensors' terms."""
    bits = re.search("[0-9]+", dtype)
    return int(bits[0]) // 8 if bits else 1


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder, and check that its files exist and have their lengths.

    Raises:
        CheckpointError: The folder does not exist, is damaged, or Lumiere did not write it.
    """
    try:
        if (folder / MANIFEST_NAME).is_symlink():
            raise damaged(folder, f"{MANIFEST_NAME} is a link")
        manifest = _parse(folder, read_file(folder / MANIFEST_NAME, MAX_BYTES))
        _check_files(folder, manifest)
    except FileNotFoundError:
        if not folder.is_dir():
            raise missing(folder) from None
        raise CheckpointError(f"{str(folder)!r} is not a checkpoint: it has no {MANIFEST_NAME}", DAMAGE_HINT) from None
    except OSError as error:
        raise unreadable(folder, error) from None
    return manifest


def read_format(folder: Path) -> str | None:
    """Return the number of the format of a folder; None if it is not a checkpoint."""
    try:
        contents = parse_json(read_file(folder / MANIFEST_NAME, MAX_BYTES))
    except (OSError, ValueError):
        return None
    number = contents.get("lumiere_format") if isinstance(contents, dict) else None
    return number if isinstance(number, str) else None


def hash_file(file: BinaryIO) -> str:
    """Return the SHA-256 of a file from its current position to its end."""
    digest = hashlib.sha256()
    while data := file.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


def _parse(folder: Path, data: bytes) -> Manifest:
    try:
        contents = parse_json(data)
    except ValueError:
        contents = None
    if not isinstance(contents, dict):
        raise damaged(folder, f"{MANIFEST_NAME} is not a JSON object")
    check_format(folder, contents.get("lumiere_format"), ("1", "2"))
    if contents.pop("sha256", None) != _hash(contents):
        raise damaged(folder, f"{MANIFEST_NAME} does not match its hash")
    try:
        manifest = Manifest(
            metadata=contents["metadata"],
            files=tuple(
                FileEntry(file["name"], file["bytes"], file["sha256"], file.get("prefix", ""))
                for file in contents["files"]
            ),
            tensors={
                name: TensorEntry(
                    entry["dtype"], tuple(entry["shape"]), tuple(Shard(*part) for part in entry["shards"])
                )
                for name, entry in contents["tensors"].items()
            },
        )
        sound = _is_sound(manifest)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise damaged(folder, f"{MANIFEST_NAME} does not list files and tensors") from None
    if not sound:
        raise damaged(folder, f"{MANIFEST_NAME} holds values that are out of range")
    for name, tensor in manifest.tensors.items():
        ends = [0, *(shard.end for shard in tensor.shards)]
        starts = [*(shard.start for shard in tensor.shards), tensor.num_rows]
        if ends != starts or any(shard.start >= shard.end for shard in tensor.shards):
            raise damaged(folder, f"the shards of {shortened(name)} overlap or leave gaps")
    return manifest


def _is_sound(manifest: Manifest) -> bool:
    """Return whether all values have their types and ranges."""
    lengths = [0] * len(manifest.files)
    sound = isinstance(manifest.metadata, dict) and len({file.name for file in manifest.files}) == len(lengths)
    for file in manifest.files:
        sound &= isinstance(file.name, str) and bool(FILE_PATTERN.fullmatch(file.name))
        sound &= _is_count(file.bytes) and isinstance(file.sha256, str) and isinstance(file.prefix, str)
    for name, tensor in manifest.tensors.items():
        sound &= name.partition(".")[0] in GROUPS and tensor.dtype in DTYPES and len(tensor.shape) <= MAX_DIMENSIONS
        sound &= all(map(_is_count, tensor.shape))
        # An axis of length 0 must not hide another one that is longer than torch can count.
        sound &= math.prod(max(1, length) for length in tensor.shape) * item_size(tensor.dtype) < 2**63
        for shard in tensor.shards:
            sound &= all(map(_is_count, shard)) and name.startswith(manifest.files[shard.file].prefix)
            lengths[shard.file] += math.prod(tensor.shard_shape(shard)) * item_size(tensor.dtype)
    # The rest of a file is its header.
    return sound and all(
        length <= file.bytes <= length + 8 + MAX_HEADER_BYTES
        for file, length in zip(manifest.files, lengths, strict=True)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_files(folder: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        try:
            status = (folder / file.name).lstat()
        except FileNotFoundError:
            raise damaged(folder, f"{file.name} is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise damaged(folder, f"{file.name} is not a regular file")
        if status.st_size != file.bytes:
            raise damaged(folder, f"{file.name} has {status.st_size:,} bytes instead of {file.bytes:,}")
    # Other readers of such folders, torch's among them, take all files that they find.
    if strangers := {path.name for path in folder.glob("*.safetensors")} - {file.name for file in manifest.files}:
        raise damaged(folder, f"{shortened(min(strangers))} does not belong there")


def _hash(contents: Mapping[str, Any]) -> str:
    """Return a hash of the values, independent of the layout of the text."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
