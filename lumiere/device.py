"""Devices, precisions, and how the C library keeps memory while a model trains."""

import ctypes
import sys
import time
from typing import Literal

import torch

from lumiere.errors import LumiereError

# On a CPU the operations between the matrix products are float32 either way, and conversions cost time: a faster step
# needs products that are this much faster.
BFLOAT16_MIN_GAIN = 1.4
PEAK_SECONDS = 0.1
PEAK_MIN_REPEATS = 3


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the first CUDA device, or else the CPU.

    Raises:
        LumiereError: The device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    there = {
        "cpu": index == "",
        "cuda": torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available() and index == "",
    }
    if not there.get(kind, False):
        present = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        present += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
        raise LumiereError(f"there is no device '{name}'", f"this machine has {', '.join(present)}")
    return torch.device(name)


def resolve_precision(name: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """Return the type of the matrix products.

    `auto` is bfloat16 if the device computes in it faster, else float32. On a CPU this is measured, in a tenth of a
    second: some emulate bfloat16, and on some that have it, it is slower than float32.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gain = peak_flops(device, torch.bfloat16) / peak_flops(device, torch.float32) if device.type == "cpu" else 0.0
        fast = gain >= BFLOAT16_MIN_GAIN
    return torch.bfloat16 if fast else torch.float32


def prefers_hand_written(x: torch.Tensor) -> bool:
    """Return whether our own kernels are faster for `x` than torch's operations.

    They are on a CPU, where each pass over memory counts. Accelerators have fused kernels of their own, and
    `torch.compile` fuses plain operations better.
    """
    return x.is_cpu and not torch.compiler.is_compiling()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of matrix products, counting multiply and add as two.

    The best of several products counts, because other processes can only slow them down.
    """
    size = 512 if device.type == "cpu" else 4096
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < PEAK_MIN_REPEATS or sum(seconds) < PEAK_SECONDS:
        start = time.perf_counter()
        torch.mm(left, right).sum().item()  # the sum's value makes the host wait for an accelerator
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


# <malloc.h> of glibc: the parameters' numbers, and the largest threshold that it takes.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20
LARGEST_TRIM_THRESHOLD = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next step instead of returning it to the system.

    A step frees all its activations at its end. Returned memory comes back as fresh pages that the system must clear
    and map one by one, thousands per step: on some machines that takes a quarter of a training step. The peak stays the
    same; memory only no longer shrinks between steps.

    Returns:
        Whether it worked; False with another C library.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, LARGEST_TRIM_THRESHOLD))
