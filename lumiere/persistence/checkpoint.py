"""A checkpoint: one safetensors file that is whole and unchanged, or an error that says what is wrong.

The tensors are named `model.*`, `optimizer.*` and `rng.*`; everything else is JSON text in the file's metadata. What is
loaded may also be a folder of such files (`lumiere.persistence.sharded`).
Importing this module loads neither torch nor safetensors, and `read_metadata` needs neither.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lumiere.errors import CheckpointError
from lumiere.files import open_file, parse_json
from lumiere.persistence.atomic import write_atomically
from lumiere.persistence.checkpoint_format import (
    FORMAT_NUMBER,
    GROUPS,
    Checkpoint,
    Header,
    check_format,
    check_groups,
    check_memory,
    damaged,
    decode,
    read_header,
    span,
    unreadable,
    unwritable,
)

if TYPE_CHECKING:
    from torch import Tensor


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` atomically, with a hash of the metadata and of each group of tensors.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
        ValueError: the metadata holds NaN or infinity, which JSON does not have.
    """
    import safetensors.torch

    metadata = json.dumps(checkpoint.metadata, allow_nan=False)
    texts = {
        "format": "pt",  # transformers refuses a file without it
        "lumiere_format": str(FORMAT_NUMBER),
        "metadata": metadata,
        "sha256.metadata": _hash_text(metadata),
    }
    tensors: dict[str, Tensor] = {}
    memories: set[int] = set()
    for group in GROUPS:
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in getattr(checkpoint, group).items()}
        for name, tensor in found.items():
            memory = tensor.untyped_storage().data_ptr()
            # Safetensors refuses tensors that share memory; to copy all would take as much again.
            found[name] = tensor.clone() if memory in memories else tensor
            memories.add(memory)
        texts[f"sha256.{group}"] = hash_tensors(found)
        tensors |= {f"{group}.{name}": tensor for name, tensor in found.items()}
    data = safetensors.torch.save(tensors, texts)
    try:
        # Before the first byte: a disk that is filled to its end troubles others too.
        if shutil.disk_usage(Path(path).parent).free < len(data):
            raise OSError(errno.ENOSPC, f"it takes {len(data) / 1e6:,.1f} MB, more than are free")
        write_atomically(path, data)
    except OSError as error:
        raise unwritable(path, error) from error


def load_checkpoint(path: str | Path, groups: Collection[str] = GROUPS) -> Checkpoint:
    """Reads and verifies the named groups of tensors, on the CPU; the others stay empty and unread.

    Args:
        path: of the file, or of the folder that `save_shards` has written.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is none of ours.
        ValueError: `groups` names a group that does not exist.
    """
    check_groups(groups)
    path = Path(path)
    if path.is_dir():
        from lumiere.persistence.sharded import load_shards

        return load_shards(path, groups)
    # One handle for all reads: a training run may replace the file at any moment.
    with _open_for_reading(path) as file:
        header = read_header(path, file)
        metadata = _parse_metadata(path, header)
        _check_room(path, header, groups)
        tensors = {group: _read_group(path, file, header, group) for group in groups}
    return Checkpoint(
        model=tensors.get("model", {}),
        optimizer=tensors.get("optimizer", {}),
        rng=tensors.get("rng", {}),
        metadata=metadata,
    )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a checkpoint, read from the header alone, or from a folder's manifest.

    Raises:
        CheckpointError: there is no such file, its header is damaged, its length is wrong, or it is none of ours.
    """
    path = Path(path)
    if path.is_dir():
        from lumiere.persistence.manifest import read_manifest

        return read_manifest(path).metadata
    with _open_for_reading(path) as file:
        return _parse_metadata(path, read_header(path, file))


@contextmanager
def _open_for_reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_file(path) as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {str(path)!r}", "lumiere runs ls lists the runs") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _check_room(path: Path, header: Header, groups: Collection[str]) -> None:
    wanted = [span(entry) for name, entry in header.entries.items() if name.partition(".")[0] in groups]
    check_memory(path, [end - begin for begin, end in wanted])


def _parse_metadata(path: Path, header: Header) -> dict[str, Any]:
    check_format(path, header.texts.get("lumiere_format"))
    text = header.texts.get("metadata", "")
    if header.texts.get("format") != "pt" or _hash_text(text) != header.texts.get("sha256.metadata"):
        raise damaged(path, "its metadata does not match its hash")
    try:
        metadata = parse_json(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise damaged(path, "its metadata is no JSON object")
    return metadata


def _read_group(path: Path, file: BinaryIO, header: Header, group: str) -> dict[str, Tensor]:
    prefix = f"{group}."
    tensors = {
        name.removeprefix(prefix): _read_tensor(path, file, header.data_start, entry)
        for name, entry in header.entries.items()
        if name.startswith(prefix)
    }
    if hash_tensors(tensors) != header.texts.get(f"sha256.{group}"):
        raise damaged(path, f"the {group}'s tensors do not match their hash")
    return tensors


def _read_tensor(path: Path, file: BinaryIO, data_start: int, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    file.seek(data_start + begin)
    return decode(path, entry, file.read(end - begin))


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash over the sorted names, types, shapes and raw bytes of contiguous tensors on the CPU."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
