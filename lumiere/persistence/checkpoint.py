"""Checkpoints as single safetensors files, verified by hash.

The tensors are named `model.*`, `optimizer.*` and `rng.*`; everything else is JSON text in the file's metadata. What is
loaded may also be a folder of such files (`lumiere.persistence.sharded`). The format is
https://huggingface.co/docs/safetensors: the header's length in 8 bytes, a JSON header, the data.
Importing this module loads neither torch nor safetensors, and `read_metadata` needs neither.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lumiere.components.short_repr import ShortRepr
from lumiere.errors import CheckpointError, shortened
from lumiere.files import open_file, parse_json, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_NUMBER = 1
GROUPS = ("model", "optimizer", "rng")
MAX_HEADER_BYTES = 10_000_000  # ours have some kB; the format allows ten times as many, which as JSON are gigabytes
DAMAGE_HINT = "use another checkpoint of the run: best, latest, previous, or a step's"


@dataclass(frozen=True, eq=False)
class Checkpoint(ShortRepr):
    """All that a run needs to go on, or, with nothing but `model`, the weights of one step.

    Attributes:
        model: the model's state dict.
        optimizer: the optimizers' tensors, by names of the trainer's choice.
        rng: the states of the random number generators.
        metadata: JSON values: config, step, best loss, state of early stopping, hashes of corpus and tokenizer.
        folder: where the numbers are, if the tensors have only names, types and shapes (torch's meta device).
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def step(self) -> int:
        """Updates that the weights have seen.

        Raises:
            CheckpointError: the metadata does not say.
        """
        step = self.metadata.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise CheckpointError("the checkpoint does not say of which step it is", DAMAGE_HINT)
        return step


@dataclass(frozen=True)
class Header:
    """What stands before the tensors' data: the file's metadata, and where each tensor is."""

    texts: dict[str, str]
    entries: dict[str, dict[str, Any]]
    data_start: int


def unwritable(path: str | Path, error: OSError) -> CheckpointError:
    """What to raise where a checkpoint could not be written."""
    return CheckpointError(
        f"{str(path)!r} cannot be written: {error.strerror or error}",
        "make room or check the folder's permissions; the checkpoint that was there is untouched",
    )


def check_groups(groups: Collection[str]) -> None:
    """Refuses the name of a group that does not exist, with a ValueError."""
    if unknown := set(groups) - set(GROUPS):
        raise ValueError(f"no group {', '.join(sorted(unknown))} in a checkpoint, it has {', '.join(GROUPS)}")


def read_header(path: Path, file: BinaryIO) -> Header:
    """The header of a safetensors file, from whose start `file` reads.

    Raises:
        CheckpointError: it is none, or announces other bytes than there are.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise damaged(path, f"a file of {size} bytes is too short")
    length = int.from_bytes(file.read(8), "little")
    data_start = 8 + length
    if length > MAX_HEADER_BYTES or data_start > size:
        raise damaged(path, f"it announces a header of {length:,} bytes, which cannot be")
    try:
        entries = parse_json(file.read(length))
        texts = dict(entries.pop("__metadata__", {}))
        sound = all(isinstance(text, str) for text in texts.values())
        spans = sorted(map(span, entries.values()))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged(path, "its header is not that of a safetensors file") from None
    # Each tensor begins where the one before it ends: otherwise a small file could make large ones, of the same bytes.
    if not sound or any(begin != end for (begin, _), (_, end) in zip(spans, [(0, 0), *spans], strict=False)):
        raise damaged(path, "its metadata is no text, or its tensors overlap or leave gaps")
    announced = data_start + (spans[-1][1] if spans else 0)
    if announced != size:
        raise damaged(path, f"it has {size:,} bytes, its header announces {announced:,}")
    return Header(texts, entries, data_start)


def span(entry: Any) -> tuple[int, int]:
    """Where the bytes of a tensor begin and end, counted from the start of the data."""
    match entry["data_offsets"]:
        case [int(begin), int(end)] if 0 <= begin <= end:
            return begin, end
    raise ValueError("no span")


def check_memory(path: Path, sizes: Collection[int]) -> None:
    """Refuse tensors that do not fit into the free memory: a file with holes may announce terabytes.

    Args:
        sizes: of the tensors to read, in bytes. Reading one takes three times its size for a moment.

    Raises:
        CheckpointError: they do not fit.
    """
    available = available_memory()
    needed = sum(sizes) + 2 * max(sizes, default=0)
    if available is not None and needed > available:
        raise CheckpointError(
            f"{str(path)!r} holds {sum(sizes) / 1e9:,.1f} GB of tensors; loading them takes {needed / 1e9:,.1f} GB of "
            f"memory, {available / 1e9:,.1f} GB are free",
            "free memory, or use a machine with more; if the model is small, the checkpoint is damaged: use another",
        )


def available_memory() -> int | None:
    """Return the bytes of memory that this process can still get; None where the system does not say.

    On Linux what is available, at most the limit of the control group (containers); elsewhere all of the machine's.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text()
        amounts = [1024 * int(kilobytes) for kilobytes in re.findall(r"MemAvailable: *([0-9]+) kB", meminfo)]
    except OSError:
        amounts = []
    if not amounts and hasattr(os, "sysconf"):
        amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError):  # there is no limit
        amounts.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(amounts, default=None)


def check_format(path: Path, number: Any) -> None:
    """Refuses what is not in the format of this Lumiere.

    Raises:
        CheckpointError: it is no checkpoint of Lumiere, or one of another format.
    """
    if not isinstance(number, str):
        raise CheckpointError(
            f"{str(path)!r} is a safetensors file, but no checkpoint of Lumiere",
            "Lumiere's own are in the checkpoints folder of a run",
        )
    if number != str(FORMAT_NUMBER):
        is_newer = re.fullmatch("[1-9][0-9]*", number)
        raise CheckpointError(
            f"{str(path)!r} has format {shortened(number, 20)!r}, this Lumiere reads format {FORMAT_NUMBER}",
            "a newer Lumiere wrote it: update this one, with git pull in its checkout" if is_newer else DAMAGE_HINT,
        )


def decode(path: Path, entry: Mapping[str, Any], data: bytes) -> Tensor:
    """The tensor of a type and shape whose bytes are `data`, by safetensors itself, as a file with nothing else.

    Raises:
        CheckpointError: there is no such type, or it has another number of bytes.
    """
    import safetensors.torch

    header = json.dumps({"tensor": {**entry, "data_offsets": [0, len(data)]}}).encode()
    try:
        return safetensors.torch.load(len(header).to_bytes(8, "little") + header + data)["tensor"]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        raise damaged(path, "a tensor's type and shape do not match its bytes") from None


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What to raise where a checkpoint is there and cannot be read."""
    return CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}", "check the path")


def damaged(path: Path, reason: str) -> CheckpointError:
    """What to raise where a checkpoint is not as it was written."""
    return CheckpointError(f"{str(path)!r} is damaged: {reason}", DAMAGE_HINT)


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
