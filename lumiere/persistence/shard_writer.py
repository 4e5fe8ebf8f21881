"""Writes shards: this process's rows, by `torch.distributed.checkpoint` and its Hugging Face writer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Rows

from lumiere.distributed import ProcessGroup
from lumiere.files import parse_json
from lumiere.persistence.checkpoint import open_safetensors, unwritable
from lumiere.persistence.manifest import Shard, ShardedTensor, ShardFile, hash_file


class Described(NamedTuple):
    """A file that was written; of each tensor in it the type, the first row, and the one after the last."""

    file: ShardFile
    rows: dict[str, tuple[str, int, int]]


def check_placement(name: str, tensor: Tensor) -> None:
    """Refuses a DTensor that is shared out otherwise than by rows, with a ValueError."""
    if isinstance(tensor, DTensor) and not all(place in (Rows(0), Replicate()) for place in tensor.placements):
        raise ValueError(f"{name} is placed as {tensor.placements}, a checkpoint takes shards of rows")


def own_bytes(tensors: Mapping[str, Tensor], processes: ProcessGroup) -> int:
    """How many bytes this process is to write, or a few more."""
    return sum(
        _local(tensor).nbytes for tensor in tensors.values() if processes.rank == 0 or isinstance(tensor, DTensor)
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_shards(temporary: Path, folder: Path, tensors: Mapping[str, Tensor], processes: ProcessGroup) -> None:
    """Writes each process's rows into one file a group; what all processes have, rank 0 writes into files of its own.

    Every process calls it, with the same names.

    Args:
        temporary: where they are written.
        folder: what shall become of it, for the error.

    Raises:
        CheckpointError: in all processes, where one cannot write.
    """
    parts = {name: (name.partition(".")[0], isinstance(tensor, DTensor)) for name, tensor in tensors.items()}
    numbers = {part: number for number, part in enumerate(sorted(set(parts.values())), start=1)}
    writer = HuggingFaceStorageWriter(
        str(temporary),
        fqn_to_index_mapping={name: numbers[part] for name, part in parts.items()},
        save_distributed=True,
    )
    with without_warnings():
        try:
            save(
                _writable(tensors),
                storage_writer=writer,
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                no_dist=processes.size == 1,
            )
        except CheckpointException as error:
            cause = cause_of(error)
            raise unwritable(folder, cause) if isinstance(cause, OSError) else cause from error


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that safetensors refuses to write, because they share memory or are not laid out row by row."""
    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        local = _local(tensor)
        memory = local.untyped_storage().data_ptr()
        copied = not local.is_contiguous() or memory in seen
        written[name] = tensor.clone(memory_format=torch.contiguous_format) if copied else tensor
        seen.add(memory)
    return written


def describe_own(temporary: Path, processes: ProcessGroup) -> list[Described]:
    """The files that this process has written, which are then on the disk.

    Raises:
        OSError: they cannot be read again.
    """
    return [_describe(path) for path in sorted(temporary.glob(f"shard-{processes.rank + 1:05d}-*"))]


def _describe(path: Path) -> Described:
    with open(path, "rb+") as file:
        # Once more than torch (2.13), which syncs before it has handed over all that it buffers.
        os.fsync(file.fileno())
        digest = hash_file(file)
        num_bytes = file.tell()
    rows = {}
    with open_safetensors(path) as file:
        places = parse_json(file.metadata()["DCP_SHARDING_INFO"])
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensor, start = file.get_slice(name), (places[name]["saved_offsets"] or [0])[0]
            rows[name] = (tensor.get_dtype(), start, start + (list(tensor.get_shape()) or [1])[0])
    return Described(ShardFile(path.name, num_bytes, digest), rows)


def find_shards(name: str, tensor: Tensor, files: list[Described]) -> ShardedTensor:
    """Where the rows of a tensor are, among the files of all processes."""
    found = [(described.rows[name], number) for number, described in enumerate(files) if name in described.rows]
    shards = sorted((start, end, number) for (_, start, end), number in found if start < end)
    return ShardedTensor(
        dtype=found[0][0][0],
        shape=tuple(tensor.shape),
        shards=tuple(Shard(number, start, end) for start, end, number in shards),
    )


def cause_of(error: CheckpointException) -> BaseException:
    """What went wrong in the process of the lowest rank in which something did."""
    return min(error.failures.items())[1][0]


def without_warnings() -> warnings.catch_warnings:
    """Keeps torch from saying that there is only one process, or that it does not ask the others."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
