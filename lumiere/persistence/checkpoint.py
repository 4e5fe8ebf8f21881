"""Checkpoints as folders of safetensors files, verified by hash.

One process writes `model.safetensors`, `optimizer.safetensors`, `rng.safetensors` and, if the model's weights are an
average, `trained.safetensors` with the weights that are trained. Several processes may write their own rows instead,
into files named as by `torch.distributed.checkpoint`'s Hugging Face writer. `checkpoint.json` lists the files; it is
written last.
Importing this module loads neither torch nor safetensors, and `read_metadata` needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.components.short_repr import ShortRepr
from lumiere.errors import CheckpointError
from lumiere.files import open_file
from lumiere.persistence import format_1
from lumiere.persistence.manifest import (
    DAMAGE_HINT,
    DTYPES,
    GROUPS,
    FileEntry,
    Manifest,
    Shard,
    TensorEntry,
    damaged,
    hash_file,
    missing,
    read_manifest,
    unreadable,
)
from lumiere.persistence.tensor_files import check_memory, open_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    Rows = Callable[[str, tuple[int, ...]], slice]

TRAINED = "trained."
"""Prefix, among the optimizer's tensors, of the trained weights if the model in a checkpoint is their average."""


@dataclass(frozen=True, eq=False)
class Checkpoint(ShortRepr):
    """The whole state of a run; with `model` alone, the weights of one step.

    Attributes:
        model: The model's state dict.
        optimizer: The optimizers' tensors, by names of the trainer's choice.
        rng: The states of the random number generators.
        metadata: JSON values: config, step, best loss, state of early stopping, hashes of corpus and tokenizer.
        folder: Where to read the tensors, if they are on torch's meta device.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def step(self) -> int:
        """Number of updates that the weights have seen.

        Raises:
            CheckpointError: The metadata lacks it.
        """
        step = self.metadata.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise CheckpointError("the checkpoint does not state its step", DAMAGE_HINT)
        return step

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by full name, such as `optimizer.token_embedding.weight.exp_avg`."""
        return {f"{group}.{name}": tensor for group in GROUPS for name, tensor in getattr(self, group).items()}

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: dict[str, Any], folder: Path | None = None
    ) -> Checkpoint:
        """Return the checkpoint with these tensors, given by full name."""
        checkpoint = cls({}, metadata=metadata, folder=folder)
        for full_name, tensor in tensors.items():
            group, _, name = full_name.partition(".")
            getattr(checkpoint, group)[name] = tensor
        return checkpoint


# Reading


def load_checkpoint(path: str | Path, groups: Collection[str] = GROUPS, rows: Rows | None = None) -> Checkpoint:
    """Read and verify the named groups of tensors, to the CPU; the others stay empty and unread.

    Args:
        path: The folder, or a file of format 1.
        rows: Return the rows to read, given a tensor's full name and shape. Default: all. Only the files that hold
            some of them are read and verified. Needs a folder.

    Raises:
        CheckpointError: It does not exist, is damaged, or Lumiere did not write it.
        ValueError: `groups` names a group that does not exist.
    """
    if unknown := set(groups) - set(GROUPS):
        raise ValueError(f"no group {', '.join(sorted(unknown))} in a checkpoint, it has {', '.join(GROUPS)}")
    path = Path(path)
    if path.is_file():
        metadata, tensors = format_1.load_file(path, groups)
        return Checkpoint(*(tensors.get(group, {}) for group in GROUPS), metadata=metadata)
    manifest = read_manifest(path)
    wanted = {name: entry for name, entry in manifest.tensors.items() if name.partition(".")[0] in groups}
    if rows is None:
        check_memory(path, [entry.nbytes for entry in wanted.values()])
    return Checkpoint.of_tensors(_read_tensors(path, manifest, wanted, rows), manifest.metadata)


def load_outline(folder: Path, verify: bool) -> Checkpoint:
    """Return what `load_checkpoint` would, with `folder` set and the tensors on torch's meta device.

    Args:
        verify: Read each file once to compare its hash.

    Raises:
        CheckpointError: As `load_checkpoint`.
    """
    import torch

    manifest = read_manifest(folder)
    if verify:
        for file in manifest.files:
            _verify(folder, file)
    tensors = {
        name: torch.empty(entry.shape, dtype=getattr(torch, DTYPES[entry.dtype]), device="meta")
        for name, entry in manifest.tensors.items()
    }
    return Checkpoint.of_tensors(tensors, manifest.metadata, folder)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint; loads no torch.

    Raises:
        CheckpointError: It does not exist, its manifest or a length is damaged, or Lumiere did not write it.
    """
    path = Path(path)
    return format_1.read_metadata(path) if path.is_file() else read_manifest(path).metadata


def _read_tensors(
    folder: Path, manifest: Manifest, wanted: Mapping[str, TensorEntry], rows: Rows | None
) -> dict[str, Tensor]:
    reads: list[tuple[Shard, int, int, str]] = []
    for name, entry in wanted.items():
        start, end, _ = (rows(name, entry.shape) if rows else slice(None)).indices(entry.num_rows)
        reads += [
            (shard, max(start, shard.start), min(end, shard.end), name)
            for shard in entry.shards
            if max(start, shard.start) < min(end, shard.end)
        ]
    parts: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in wanted}
    for index, of_file in groupby(sorted(reads), key=lambda read: read[0].file):
        file = manifest.files[index]
        _verify(folder, file)
        with open_safetensors(folder / file.name) as opened:
            for shard, start, end, name in of_file:
                entry = wanted[name]
                key = name.removeprefix(file.prefix)
                part = opened.get_slice(key)
                if (part.get_dtype(), list(part.get_shape())) != (entry.dtype, entry.shard_shape(shard)):
                    raise damaged(folder / file.name, f"it does not hold the rows of {name} that it should")
                found = part[start - shard.start : end - shard.start] if entry.shape else opened.get_tensor(key)
                parts[name].append((start, found))
    return {
        name: _joined(wanted[name], [part for _, part in sorted(parts[name], key=itemgetter(0))]) for name in wanted
    }


def _joined(entry: TensorEntry, parts: list[Tensor]) -> Tensor:
    """Return a copy of the rows: safetensors maps the file."""
    import torch

    if not entry.shape:
        return parts[0].clone()
    return torch.cat(parts or [torch.empty(0, *entry.shape[1:], dtype=getattr(torch, DTYPES[entry.dtype]))])


def _verify(folder: Path, file: FileEntry) -> None:
    path = folder / file.name
    try:
        with open_file(path) as opened:
            digest = hash_file(opened)
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if digest != file.sha256:
        raise damaged(path, "it does not match its hash")
