"""What a checkpoint is, and the format of its files: the part that a single file and a folder of shards have in common.

The format is https://huggingface.co/docs/safetensors: the header's length in 8 bytes, a JSON header, the data.
Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lumiere.components.short_repr import ShortRepr
from lumiere.errors import CheckpointError, shortened
from lumiere.files import parse_json

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
