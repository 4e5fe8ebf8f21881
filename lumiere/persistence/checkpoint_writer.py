"""Write the files of a checkpoint, from one process or from all that hold rows of its tensors."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lumiere.distributed import SINGLE_PROCESS, ProcessGroup, is_dtensor, rows_of
from lumiere.errors import CheckpointError
from lumiere.files import DISK, Disk, open_file
from lumiere.persistence.checkpoint import TRAINED, Checkpoint
from lumiere.persistence.manifest import (
    DTYPES,
    MANIFEST_NAME,
    MAX_BYTES,
    FileEntry,
    Manifest,
    Shard,
    TensorEntry,
    hash_file,
)

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
FILES = {f"optimizer.{TRAINED}": "trained", "model.": "model", "optimizer.": "optimizer", "rng.": "rng"}
"""Prefix of the tensors in each file that one process writes; the first that matches counts."""
DTYPE_NAMES = {f"torch.{name}": dtype for dtype, name in DTYPES.items()}


@dataclass
class Part:
    """A file to write: rows of tensors by full name, and the first row of each.

    Attributes:
        prefix: As in `FileEntry`.
    """

    name: str
    prefix: str
    rows: dict[str, Tensor]
    starts: dict[str, int]

    def write(self, folder: Path, disk: Disk) -> tuple[FileEntry, dict[str, tuple[int, int]]]:
        """Write the file; return its entry, and the first row of each tensor and the row after the last."""
        metadata = {"format": "pt"}  # transformers refuses a file without it
        if not self.prefix:
            offsets = {
                name: {"saved_offsets": [self.starts[name], *[0] * (rows.dim() - 1)][: rows.dim()]}
                for name, rows in self.rows.items()
            }
            # By these, torch's HuggingFaceStorageReader finds the rows.
            metadata |= {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        path = folder / self.name
        short = {name.removeprefix(self.prefix): rows for name, rows in writable(self.rows).items()}
        disk.write_tensors(path, short, metadata)
        with open_file(path) as file:
            entry = FileEntry(self.name, os.fstat(file.fileno()).st_size, hash_file(file), self.prefix)
        ranges = {name: (self.starts[name], self.starts[name] + num_rows(rows)) for name, rows in self.rows.items()}
        return entry, ranges


def write_checkpoint(
    folder: Path, checkpoint: Checkpoint, processes: ProcessGroup | None = None, disk: Disk = DISK
) -> None:
    """Make a folder and write a checkpoint into it, the manifest last.

    Args:
        processes: All of them call this with the same names; each writes its rows, and rank 0 what all hold. None:
            this process writes full tensors.

    Raises:
        OSError: A process cannot write; raised in all of them.
        ValueError: The metadata holds NaN or infinity, or a tensor is sharded otherwise than by rows.
    """
    Manifest(checkpoint.metadata, (), {}).to_bytes()
    tensors = checkpoint.tensors()
    parts = whole_parts(tensors) if processes is None else own_parts(tensors, processes)
    group = processes or SINGLE_PROCESS
    size = group.all_reduce_sum(sum(rows.nbytes for part in parts for rows in part.rows.values()))
    together(group, lambda: _make_folder(folder, size, disk) if group.rank == 0 else None)
    written = together(group, lambda: [part.write(folder, disk) for part in parts])
    everyones = [found for of_one in gathered(written, group) for found in of_one]
    together(group, lambda: _finish(folder, checkpoint.metadata, tensors, everyones, disk) if group.rank == 0 else None)


def whole_parts(tensors: Mapping[str, Tensor]) -> list[Part]:
    """Return the files of one process, each with tensors of one prefix."""
    parts: dict[str, Part] = {}
    for name, tensor in tensors.items():
        prefix = next(prefix for prefix in FILES if name.startswith(prefix))
        part = parts.setdefault(prefix, Part(f"{FILES[prefix]}.safetensors", prefix, {}, {}))
        part.rows[name], part.starts[name] = tensor, 0
    return list(parts.values())


def own_parts(tensors: Mapping[str, Tensor], processes: ProcessGroup) -> list[Part]:
    """Return this process' files, named as by torch's HuggingFaceStorageWriter.

    Raises:
        ValueError: A tensor is sharded otherwise than by rows.
    """
    kinds = {name: (name.partition(".")[0], is_dtensor(tensor)) for name, tensor in tensors.items()}
    numbers = {kind: number for number, kind in enumerate(sorted(set(kinds.values())), start=1)}
    parts: dict[int, Part] = {}
    for name, tensor in tensors.items():
        rows, start = own_rows(name, tensor)
        if processes.rank and not (is_dtensor(tensor) and num_rows(rows)):
            continue
        number = numbers[kinds[name]]
        file_name = f"shard-{processes.rank + 1:05d}-model-{number:05d}-of-{len(numbers):05d}.safetensors"
        part = parts.setdefault(number, Part(file_name, "", {}, {}))
        part.rows[name], part.starts[name] = rows, start
    return list(parts.values())


def own_rows(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    """Return the rows of a tensor that this process holds, and the first one's number.

    Raises:
        ValueError: It is sharded otherwise than by rows.
    """
    if not is_dtensor(tensor):
        return tensor, 0
    if [str(placement) for placement in tensor.placements] != ["S(0)"]:
        raise ValueError(f"{name} is placed as {tensor.placements}; a checkpoint takes shards of rows")
    mesh = tensor.device_mesh
    return tensor.to_local(), rows_of(len(tensor), mesh.get_local_rank(), mesh.size()).start


def num_rows(tensor: Tensor) -> int:
    """Return the number of rows; a tensor without dimensions is one."""
    return len(tensor) if tensor.dim() else 1


def writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU that share no memory: safetensors writes no others."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        # Cloned only where needed: copying all would take their memory again.
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def together(processes: ProcessGroup, work: Callable[[], T]) -> T:
    """Return what `work` returns if it succeeds in every process.

    Raises:
        OSError, CheckpointError: What `work` raised here; an OSError if it failed in another process.
    """
    result, problem = None, None
    try:
        result = work()
    except (OSError, CheckpointError) as error:
        problem = error
    # Every process takes part, whatever happened in it: the others would wait for it.
    number = problem.errno if isinstance(problem, OSError) else None
    code = processes.all_reduce_max((number or errno.EIO) if problem else 0)
    if problem:
        raise problem
    if code:
        raise OSError(code, os.strerror(code))
    return result  # pyright: ignore[reportReturnType] (no problem, so there is one)


def gathered(own: T, processes: ProcessGroup) -> list[T]:
    """Return what each process has, in the order of ranks."""
    if processes.size == 1:
        return [own]
    import torch.distributed as dist

    parts: list[Any] = [None] * processes.size
    dist.all_gather_object(parts, own)
    return parts


def _make_folder(folder: Path, num_bytes: float, disk: Disk) -> None:
    folder.parent.mkdir(exist_ok=True)
    disk.check_room(folder.parent, num_bytes)
    disk.make_folder(folder)


def _finish(
    folder: Path,
    metadata: dict[str, Any],
    tensors: Mapping[str, Tensor],
    written: list[tuple[FileEntry, dict[str, tuple[int, int]]]],
    disk: Disk,
) -> None:
    """Write the manifest; the folder is durable then, with all its names."""
    shards = {name: [Shard(i, *rows[name]) for i, (_, rows) in enumerate(written) if name in rows] for name in tensors}
    entries = {
        name: TensorEntry(
            DTYPE_NAMES[str(tensor.dtype)],
            tuple(tensor.shape),
            tuple(sorted((shard for shard in shards[name] if shard.start < shard.end), key=lambda shard: shard.start)),
        )
        for name, tensor in tensors.items()
    }
    data = Manifest(metadata, tuple(entry for entry, _ in written), entries).to_bytes()
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{MANIFEST_NAME} would have {len(data):,} bytes, too many to be read again")
    disk.write(folder / MANIFEST_NAME, data)
