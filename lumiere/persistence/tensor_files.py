"""Safetensors files: open untrusted ones, and bound the memory that they take.

Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.errors import CheckpointError, shortened
from lumiere.files import open_file
from lumiere.persistence.manifest import MAX_HEADER_BYTES, damaged, missing, unreadable

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def open_safetensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file by `safetensors.safe_open`, which checks its header, types, shapes and length.

    Raises:
        CheckpointError: The file does not exist or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open_file(path) as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise damaged(path, f"it announces a header of {length:,} bytes")
        with safe_open(path, framework=framework) as file:
            yield file
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (SafetensorError, UnicodeError) as error:
        raise damaged(path, shortened(str(error))) from None
    except (RuntimeError, TypeError, ValueError, OverflowError, AttributeError):
        raise damaged(path, "a tensor's type or shape cannot be read") from None


def check_memory(path: Path, sizes: Collection[int]) -> None:
    """Check that tensors fit into the free memory: a sparse file may announce terabytes.

    Args:
        sizes: Bytes of each tensor to read. While it is read, a tensor takes three times its size.

    Raises:
        CheckpointError: They do not fit.
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
    """Return the bytes of memory that this process can still get; None if the system does not say.

    On Linux the available memory, at most the limit of the control group (containers); elsewhere all of the machine's.
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


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the sorted names, types, shapes and raw bytes of contiguous tensors on the CPU."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
