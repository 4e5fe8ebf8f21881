"""Reads shards for `torch.distributed.checkpoint`: from files that are verified first, and no more than is wanted."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from lumiere.files import open_file
from lumiere.persistence.checkpoint import check_memory, damaged, open_safetensors
from lumiere.persistence.manifest import Manifest, Shard, ShardedTensor, check_lengths, hash_file


class ShardReader(StorageReader):
    """The reading half of a load; the planning half, which rows this process needs, is torch's.

    Args:
        whole: the tensors are to be read into the memory of this machine, whole.

    Attributes:
        layouts: the shape and type of each tensor of the groups, by full name.

    Raises:
        CheckpointError: the tensors have types that do not exist, are longer than the memory, or shorter than their
            files.
    """

    def __init__(self, folder: Path, manifest: Manifest, groups: Collection[str], whole: bool) -> None:
        self._folder = folder
        self._files = manifest.files
        self._tensors = {name: tensor for name, tensor in manifest.tensors.items() if name.partition(".")[0] in groups}
        # A tensor of no numbers, to know each type by its name.
        dtypes = {dtype: _torch_type(folder, dtype) for dtype in {tensor.dtype for tensor in manifest.tensors.values()}}
        check_lengths(folder, manifest, {name: dtype.itemsize for name, dtype in dtypes.items()})
        # A length of 0 hides the others from the product, and yet they must not be beyond what torch can count.
        sizes = [
            math.prod(max(1, length) for length in tensor.shape) * dtypes[tensor.dtype].itemsize
            for tensor in self._tensors.values()
        ]
        check_memory(folder, sizes if whole else [])
        if max(sizes, default=0) >= 2**63:
            raise damaged(folder, "a tensor has more numbers than there can be")
        self.layouts = {
            name: (torch.Size(tensor.shape), dtypes[tensor.dtype]) for name, tensor in self._tensors.items()
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: self._describe(name, tensor) for name, tensor in self._tensors.items()})

    def _describe(self, name: str, tensor: ShardedTensor) -> TensorStorageMetadata:
        chunks = [
            ChunkStorageMetadata(
                offsets=torch.Size([shard.start, *[0] * len(tensor.shape[1:])][: len(tensor.shape)]),
                sizes=torch.Size(tensor.shard_shape(shard)),
            )
            for shard in tensor.shards
        ]
        shape, dtype = self.layouts[name]
        return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=shape, chunks=chunks)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[int, list[tuple[ReadItem, Shard]]] = {}
        for item in plan.items:
            tensor = self._tensors[item.storage_index.fqn]
            start = item.storage_index.offset[0] if item.storage_index.offset else 0
            shard = next(shard for shard in tensor.shards if shard.start == start)
            by_file.setdefault(shard.file, []).append((item, shard))
        for number, items in sorted(by_file.items()):
            self._read_file(number, items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def verify(self) -> None:
        """Read every file, a piece at a time, to see whether it is what was written.

        Raises:
            CheckpointError: one is not.
        """
        for file in self._files:
            with self._verified(self._folder / file.name, file.sha256):
                pass

    def _read_file(self, number: int, items: list[tuple[ReadItem, Shard]], planner: LoadPlanner) -> None:
        path = self._folder / self._files[number].name
        with self._verified(path, self._files[number].sha256) as file:
            for item, shard in items:
                tensor = self._read_rows(path, file, item, shard)
                target = planner.resolve_tensor(item).detach()
                target.copy_(tensor)
                planner.commit_tensor(item, target)

    @contextmanager
    def _verified(self, path: Path, sha256: str) -> Iterator[Any]:
        """Open a file that has its hash."""
        with open_safetensors(path) as tensors:
            with open_file(path) as file:
                if hash_file(file) != sha256:
                    raise damaged(path, "it does not match its hash")
            yield tensors

    def _read_rows(self, path: Path, file: Any, item: ReadItem, shard: Shard) -> Tensor:
        """The part of a shard that `item` asks for; of its file no other rows are read into memory."""
        name = item.storage_index.fqn
        wanted = self._tensors[name]
        shape = wanted.shard_shape(shard)
        found = file.get_slice(name)
        if (found.get_dtype(), list(found.get_shape())) != (wanted.dtype, shape):
            raise damaged(path, f"it does not hold the rows of {name} that it should")
        if not shape:
            return file.get_tensor(name)
        first, count = item.storage_offsets[0], item.lengths[0]
        rows = found[first : first + count]
        rest = zip(item.storage_offsets[1:], item.lengths[1:], strict=True)
        return rows[(slice(None), *(slice(offset, offset + length) for offset, length in rest))]

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one load to the next."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is known from the start."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _torch_type(folder: Path, name: str) -> torch.dtype:
    """Return the type that safetensors calls `name`, as it reads it from a file with nothing else."""
    import json

    import safetensors.torch

    header = json.dumps({"tensor": {"dtype": name, "shape": [0], "data_offsets": [0, 0]}}).encode()
    try:
        return safetensors.torch.load(len(header).to_bytes(8, "little") + header)["tensor"].dtype
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        raise damaged(folder, "a tensor's type and shape do not match its bytes") from None
