"""Devices, precisions, and how the C library keeps memory while a model trains."""

import ctypes
import sys
import time
from typing import Literal

import torch

from lumiere.errors import LumiereError

# On a CPU the work between the matrix products is done in float32 either way, and the conversions cost time: only
# products that are this much faster make a faster step.
BFLOAT16_MIN_GAIN = 1.4
PEAK_SECONDS = 0.1
PEAK_MIN_REPEATS = 3


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first CUDA device, or else the CPU.

    Raises:
        LumiereError: if it is not there.
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
    """The type of the matrix products.

    `auto` is bfloat16 where the device computes in it, or else float32. A CPU is asked by a measurement of a few
    milliseconds: some emulate bfloat16, and on some that have it, it is still slower than float32.
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
    """Whether a component's own forward and backward are faster for `x` than torch's operations.

    They are on a CPU, where each pass over memory counts. Accelerators have fused kernels of their own, and
    `torch.compile` fuses better what it sees written plainly.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the matrix product: the best of some products of two square matrices, multiply and add as two.

    The best, because other processes only ever slow it down.
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
    """Ask glibc to keep what is freed for the next step, where it would give it back to the system each time.

    A step frees all its activations at its end. Given back, they come again as fresh pages that the system must clear
    and map one by one, thousands a step: on some machines that takes a quarter of the time of a training step. The
    memory in use at a step's peak stays the same; it only no longer shrinks in between.

    Returns:
        Whether it could be asked: not where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, LARGEST_TRIM_THRESHOLD))
