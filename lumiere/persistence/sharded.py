"""A checkpoint as a folder: safetensors files, each written by the process that has the rows in them, and a manifest.

Written by `torch.distributed.checkpoint` and its Hugging Face writer, so that no process ever has a whole tensor, and
nothing is pickled into a file. Read through the same library, but by a reader of our own: torch's believes whatever
the files say, sees no gap between shards, and opens files by name again and again while a training may replace them.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lumiere.distributed import ProcessGroup
from lumiere.errors import CheckpointError
from lumiere.files import sync_folder
from lumiere.persistence.checkpoint import GROUPS, Checkpoint, check_groups, unwritable
from lumiere.persistence.manifest import MANIFEST_NAME, MAX_BYTES, Manifest, read_manifest
from lumiere.persistence.placing import clear, place

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lumiere.persistence.shard_writer import Described

T = TypeVar("T")
Placing = Callable[[Path, Path, str], None]
Memory = Callable[[str, "torch.Size", "torch.dtype"], "Tensor"]


def save_shards(folder: Path, checkpoint: Checkpoint, processes: ProcessGroup, place: Placing = place) -> None:
    """Writes `checkpoint` as a folder; each process calls it with the same names and writes its own rows.

    Each file is synced and hashed by its process; rank 0 writes the manifest last, and renames the whole folder into
    place. A failure of one process is an error in all of them, and what was there is untouched.

    Args:
        checkpoint: of DTensors whose rows are shared out (`Shard(0)`), or that all processes have (`Replicate()`), and
            of plain tensors that are the same in all. Rank 0 writes those that all have.
        place: what rank 0 calls with the finished folder under a temporary name, the folder to put it into, and the
            name to give it there.

    Raises:
        CheckpointError: a process cannot write.
        ValueError: the metadata holds NaN or infinity, or a tensor is shared out in another way.
    """
    from lumiere.persistence.shard_writer import check_placement, describe_own, write_shards

    tensors = {
        f"{group}.{name}": tensor.detach() for group in GROUPS for name, tensor in getattr(checkpoint, group).items()
    }
    for name, tensor in tensors.items():
        check_placement(name, tensor)
    Manifest(checkpoint.metadata, (), {}).to_bytes()
    token = processes.broadcast_text(secrets.token_hex(4) if processes.rank == 0 else None)
    temporary = folder.with_name(f".{folder.name}.{token}.tmp")
    try:
        _together(processes, folder, lambda: _make_folder(temporary, tensors, processes))
        write_shards(temporary, folder, tensors, processes)
        own = _together(processes, folder, lambda: describe_own(temporary, processes))
        parts = _gather(own, processes)
        _together(processes, folder, lambda: _finish(temporary, folder, checkpoint, tensors, parts, place, processes))
    finally:
        if processes.rank == 0 and temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)


def load_shards(folder: Path, groups: Collection[str] = GROUPS, like: Memory | None = None) -> Checkpoint:
    """Reads the named groups of tensors from a folder that `save_shards` has written, by any number of processes.

    No process group is needed, and nothing is said between processes. Each one verifies the files that it reads a row
    of, whole, before it takes the row: with as many processes as saved it, those are its own and rank 0's small ones.
    So one process may find damage where the others find none: whoever calls it in several must let them agree.

    Args:
        like: gives for a tensor's full name (`optimizer.embedding.weight.exp_avg`), shape and type the memory to read
            it into: a DTensor, of which the rows of this process are read, or a plain tensor. None stands for new
            memory for whole tensors, on the CPU.

    Raises:
        CheckpointError: there is no such folder, it is damaged, or it is none of ours.
        ValueError: `groups` names a group that does not exist, or `like` gave another shape or type.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    from lumiere.persistence.shard_reader import ShardReader
    from lumiere.persistence.shard_writer import cause_of, without_warnings

    check_groups(groups)
    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest, groups, whole=like is None)
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in reader.layouts.items():
        tensors[name] = torch.empty(shape, dtype=dtype) if like is None else like(name, shape, dtype)
        if (tensors[name].shape, tensors[name].dtype) != (shape, dtype):
            raise ValueError(f"{name} is {dtype} of {list(shape)}, the memory is another: {tensors[name].shape}")
    with without_warnings():
        try:
            load(dict(tensors), storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise cause_of(error) from error
    checkpoint = Checkpoint({}, metadata=manifest.metadata)
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        getattr(checkpoint, group)[rest] = tensor
    return checkpoint


def outline_shards(folder: Path) -> Checkpoint:
    """What `load_shards` would give, without the numbers: tensors on torch's meta device, `folder` set.

    Every file is read once and verified, a piece at a time.

    Raises:
        CheckpointError: as `load_shards`.
    """
    import torch

    from lumiere.persistence.shard_reader import ShardReader

    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest, GROUPS, whole=False)
    reader.verify()
    checkpoint = Checkpoint({}, metadata=manifest.metadata, folder=folder)
    for name, (shape, dtype) in reader.layouts.items():
        group, _, rest = name.partition(".")
        getattr(checkpoint, group)[rest] = torch.empty(shape, dtype=dtype, device="meta")
    return checkpoint


def _make_folder(temporary: Path, tensors: Mapping[str, Tensor], processes: ProcessGroup) -> None:
    from lumiere.persistence.shard_writer import own_bytes

    needed = processes.all_reduce_sum(own_bytes(tensors, processes))
    if processes.rank:
        return
    clear(temporary.parent)
    # Before the first byte: a disk that is filled to its end troubles others too.
    if shutil.disk_usage(temporary.parent).free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:,.1f} MB, more than are free")
    temporary.mkdir()


def _gather(own: T, processes: ProcessGroup) -> list[T]:
    if processes.size == 1:
        return [own]
    import torch.distributed as dist

    parts: list[Any] = [None] * processes.size
    dist.all_gather_object(parts, own)
    return parts


def _finish(
    temporary: Path,
    folder: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    parts: list[list[Described]],
    place: Placing,
    processes: ProcessGroup,
) -> None:
    if processes.rank:
        return
    from lumiere.persistence.shard_writer import find_shards

    files = [described for part in parts for described in part]
    manifest = Manifest(
        checkpoint.metadata,
        tuple(described.file for described in files),
        {name: find_shards(name, tensor, files) for name, tensor in tensors.items()},
    )
    data = manifest.to_bytes()
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{MANIFEST_NAME} would have {len(data):,} bytes, too many to be read again")
    with open(temporary / MANIFEST_NAME, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    place(temporary, folder.parent, folder.name)


def _together(processes: ProcessGroup, folder: Path, work: Callable[[], T]) -> T:
    """What `work` gives, where it succeeds in every process.

    Raises:
        CheckpointError: in all of them, where one could not read or write.
    """
    result, problem = None, None
    try:
        result = work()
    except OSError as error:
        problem = error
    except CheckpointError as error:
        problem = OSError(errno.EIO, error.message)
    code = processes.all_reduce_max((problem.errno or errno.EIO) if problem else 0)
    if code:
        raise unwritable(folder, problem or OSError(code, os.strerror(code))) from problem
    return result  # pyright: ignore[reportReturnType] (there is one, as there was no problem)
