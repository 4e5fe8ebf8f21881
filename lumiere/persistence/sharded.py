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
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lumiere.components.world import World
from lumiere.files import parse_json
from lumiere.persistence.atomic import sync_folder
from lumiere.persistence.checkpoint import GROUPS, Checkpoint, check_groups, read_header, unwritable
from lumiere.persistence.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardedTensor,
    ShardFile,
    hash_file,
    read_manifest,
)
from lumiere.persistence.placing import clear, place

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")
Placing = Callable[[Path, Path, str], None]
Memory = Callable[[str, "torch.Size", "torch.dtype"], "Tensor"]


class Described(NamedTuple):
    """A file that was written; of each tensor in it the type, the first row, and the one after the last."""

    file: ShardFile
    rows: dict[str, tuple[str, int, int]]


def save_shards(folder: Path, checkpoint: Checkpoint, world: World, place: Placing = place) -> None:
    """Writes `checkpoint` as a folder; each process of `world` calls it with the same names and writes its own rows.

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
    tensors = {
        f"{group}.{name}": tensor.detach() for group in GROUPS for name, tensor in getattr(checkpoint, group).items()
    }
    for name, tensor in tensors.items():
        _check_placement(name, tensor)
    Manifest(checkpoint.metadata, (), {}).to_bytes()
    token = world.announce(secrets.token_hex(4) if world.rank == 0 else None)
    temporary = folder.with_name(f".{folder.name}.{token}.tmp")
    try:
        _together(world, folder, lambda: _make_folder(temporary, tensors, world))
        _write(temporary, folder, tensors, world)
        own = _together(world, folder, lambda: _describe_own(temporary, world))
        parts = _gather(own, world)
        _together(world, folder, lambda: _finish(temporary, folder, checkpoint, tensors, parts, place, world))
    finally:
        if world.rank == 0 and temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)


def load_shards(folder: Path, groups: Collection[str] = GROUPS, like: Memory | None = None) -> Checkpoint:
    """Reads the named groups of tensors from a folder that `save_shards` has written, by any number of processes.

    No process group is needed, and nothing is said between processes. Each one verifies the files that it reads a row
    of, whole, before it takes the row: with as many processes as saved it, those are its own and rank 0's small ones.

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

    check_groups(groups)
    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest, groups, whole=like is None)
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in reader.layouts.items():
        tensors[name] = torch.empty(shape, dtype=dtype) if like is None else like(name, shape, dtype)
        if (tensors[name].shape, tensors[name].dtype) != (shape, dtype):
            raise ValueError(f"{name} is {dtype} of {list(shape)}, the memory is another: {tensors[name].shape}")
    with _without_warnings():
        try:
            load(dict(tensors), storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise _cause(error) from error
    checkpoint = Checkpoint({}, metadata=manifest.metadata)
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        getattr(checkpoint, group)[rest] = tensor
    return checkpoint


def _check_placement(name: str, tensor: Tensor) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if isinstance(tensor, DTensor) and not all(place in (Shard(0), Replicate()) for place in tensor.placements):
        raise ValueError(f"{name} is placed as {tensor.placements}, a checkpoint takes shards of rows")


def _make_folder(temporary: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    needed = world.total(sum(_local(tensor).nbytes for tensor in tensors.values() if _writes(tensor, world)))
    if world.rank:
        return
    clear(temporary.parent)
    # Before the first byte: a disk that is filled to its end troubles others too.
    if shutil.disk_usage(temporary.parent).free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:,.1f} MB, more than are free")
    temporary.mkdir()


def _writes(tensor: Tensor, world: World) -> bool:
    from torch.distributed.tensor import DTensor

    return world.rank == 0 or isinstance(tensor, DTensor)


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _write(temporary: Path, folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Each process's rows, into one file a group; what all processes have goes into files of its own, by rank 0."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.tensor import DTensor

    parts = {name: (name.partition(".")[0], isinstance(tensor, DTensor)) for name, tensor in tensors.items()}
    numbers = {part: number for number, part in enumerate(sorted(set(parts.values())), start=1)}
    writer = HuggingFaceStorageWriter(
        str(temporary),
        fqn_to_index_mapping={name: numbers[part] for name, part in parts.items()},
        save_distributed=True,
    )
    with _without_warnings():
        try:
            save(
                _writable(tensors),
                storage_writer=writer,
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                no_dist=world.size == 1,
            )
        except CheckpointException as error:
            cause = _cause(error)
            raise unwritable(folder, cause) if isinstance(cause, OSError) else cause from error


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that safetensors refuses to write, because they share memory or are not laid out row by row."""
    import torch

    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        local = _local(tensor)
        memory = local.untyped_storage().data_ptr()
        copied = not local.is_contiguous() or memory in seen
        written[name] = tensor.clone(memory_format=torch.contiguous_format) if copied else tensor
        seen.add(memory)
    return written


def _describe_own(temporary: Path, world: World) -> list[Described]:
    """The files that this process has written."""
    return [_describe(path) for path in sorted(temporary.glob(f"shard-{world.rank + 1:05d}-*"))]


def _describe(path: Path) -> Described:
    with open(path, "rb+") as file:
        # Once more than torch (2.13), which syncs before it has handed over all that it buffers.
        os.fsync(file.fileno())
        digest = hash_file(file)
        num_bytes = file.tell()
        file.seek(0)
        header = read_header(path, file)
    places = parse_json(header.texts["DCP_SHARDING_INFO"])
    rows = {}
    for name, entry in header.entries.items():
        start = (places[name]["saved_offsets"] or [0])[0]
        rows[name] = (entry["dtype"], start, start + (entry["shape"] or [1])[0])
    return Described(ShardFile(path.name, num_bytes, digest), rows)


def _gather(own: T, world: World) -> list[T]:
    if world.size == 1:
        return [own]
    import torch.distributed as dist

    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, own)
    return parts


def _finish(
    temporary: Path,
    folder: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    parts: list[list[Described]],
    place: Placing,
    world: World,
) -> None:
    if world.rank:
        return
    files = [described for part in parts for described in part]
    manifest = Manifest(
        checkpoint.metadata,
        tuple(described.file for described in files),
        {name: _find_shards(name, tensor, files) for name, tensor in tensors.items()},
    )
    with open(temporary / MANIFEST_NAME, "xb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    place(temporary, folder.parent, folder.name)


def _find_shards(name: str, tensor: Tensor, files: list[Described]) -> ShardedTensor:
    found = [(described.rows[name], number) for number, described in enumerate(files) if name in described.rows]
    shards = sorted((start, end, number) for (_, start, end), number in found if start < end)
    return ShardedTensor(
        dtype=found[0][0][0],
        shape=tuple(tensor.shape),
        shards=tuple(Shard(number, start, end) for start, end, number in shards),
    )


def _together(world: World, folder: Path, work: Callable[[], T]) -> T:
    """What `work` gives, where it succeeds in every process.

    Raises:
        CheckpointError: in all of them, where one could not read or write.
    """
    result, problem = None, None
    try:
        result = work()
    except OSError as error:
        problem = error
    code = world.largest((problem.errno or errno.EIO) if problem else 0)
    if code:
        raise unwritable(folder, problem or OSError(code, os.strerror(code))) from problem
    return result  # pyright: ignore[reportReturnType] (there is one, as there was no problem)


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong in the process of the lowest rank in which something did."""
    return min(error.failures.items())[1][0]


def _without_warnings() -> warnings.catch_warnings:
    return warnings.catch_warnings(action="ignore", category=UserWarning)
