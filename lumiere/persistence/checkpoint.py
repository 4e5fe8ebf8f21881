"""Checkpoints as single safetensors files, verified by hash.

The tensors are named `model.*`, `optimizer.*` and `rng.*`; everything else is JSON text in the file's metadata. What is
loaded may also be a folder of such files (`lumiere.persistence.sharded`).
Importing this module loads neither torch nor safetensors, and `read_metadata` needs no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """Read and verify the named groups of tensors, on the CPU; the others stay empty and unread.

    Args:
        path: The file, or a folder that `save_shards` has written.

    Raises:
        CheckpointError: There is no such file, it is damaged, or Lumiere did not write it.
        ValueError: `groups` names a group that does not exist.
    """
    check_groups(groups)
    path = Path(path)
    if path.is_dir():
        from lumiere.persistence.sharded import load_shards

        return load_shards(path, groups)
    with open_safetensors(path) as file:
        texts = file.metadata() or {}
        checkpoint = Checkpoint({}, metadata=_parse_metadata(path, texts))
        names = {group: [name for name in file.keys() if name.startswith(f"{group}.")] for group in groups}  # noqa: SIM118
        check_memory(path, [num_bytes(file.get_slice(name)) for group in groups for name in names[group]])
        for group in groups:
            tensors = getattr(checkpoint, group)
            # Copied, because what safetensors gives is still the file, which may change.
            tensors |= {name.removeprefix(f"{group}."): file.get_tensor(name).clone() for name in names[group]}
            if hash_tensors(tensors) != texts.get(f"sha256.{group}"):
                raise damaged(path, f"the {group}'s tensors do not match their hash")
    return checkpoint


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint, from the header of a file or the manifest of a folder; loads no torch.

    Raises:
        CheckpointError: There is no such file, its header or length is damaged, or Lumiere did not write it.
    """
    path = Path(path)
    if path.is_dir():
        from lumiere.persistence.manifest import read_manifest

        return read_manifest(path).metadata
    with open_safetensors(path, framework="numpy") as file:
        return _parse_metadata(path, file.metadata() or {})


@contextmanager
def open_safetensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file by `safetensors.safe_open`, which checks its header, types, shapes and length.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it was replaced while it was open.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Held open, so that the system gives the number of this file to no other one.
        with open_file(path) as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise damaged(path, f"it announces a header of {length:,} bytes")
            with safe_open(path, framework=framework) as file:
                yield file
            if os.stat(path).st_ino != os.fstat(opened.fileno()).st_ino:
                raise damaged(path, "it was replaced while it was read")
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {str(path)!r}", "lumiere runs ls lists the runs") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (SafetensorError, UnicodeError) as error:
        raise damaged(path, shortened(str(error))) from None
    except (RuntimeError, TypeError, ValueError, OverflowError, AttributeError):
        raise damaged(path, "a tensor's type or shape cannot be read") from None


def num_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor, given as a slice by `safe_open`, by its type (`F32`, `BOOL`) and shape."""
    bits = re.search("[0-9]+", tensor.get_dtype())
    return math.prod(tensor.get_shape()) * (int(bits[0]) if bits else 8) // 8


def _parse_metadata(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    check_format(path, texts.get("lumiere_format"))
    text = texts.get("metadata", "")
    if texts.get("format") != "pt" or _hash_text(text) != texts.get("sha256.metadata"):
        raise damaged(path, "its metadata does not match its hash")
    try:
        metadata = parse_json(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise damaged(path, "its metadata is no JSON object")
    return metadata


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
