"""Which device to compute on, and in which precision."""

from typing import Literal

import torch

from lumiere.errors import LumiereError


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
    """The type of the matrix products; `auto` is bfloat16 on CUDA devices that compute in it, or else float32."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
