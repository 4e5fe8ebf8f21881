"""A device that is not there: it has its own tensors, whose numbers lie in memory of the CPU, and no float64.

Operations give what the CPU computes. As on a real device, one that mixes its tensors with others fails, and so does
one whose result is float64, as on Apple's GPUs (mps).
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps", 0)
BETWEEN_DEVICES = ("_to_copy", "copy_", "index", "index_put_")
"""Operations that take tensors of two devices: the indices may be on the CPU."""


class DeviceTensor(torch.Tensor):
    """A tensor of the device; torch itself takes it for one of its meta device, which computes nothing."""

    held: torch.Tensor
    device = DEVICE
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "DeviceTensor":
        if held.dtype == torch.float64:
            raise TypeError("the device has no float64")
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=torch.device("meta"))
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{operation} outside of `Accelerator`")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(without_lists(index), value if isinstance(value, torch.Tensor) else torch.tensor(value))


class Accelerator(TorchDispatchMode):
    """While it is entered, `DEVICE` is there."""

    def __enter__(self) -> "Accelerator":
        # `torch.tensor` makes its tensor on the CPU, and moves it by an operation that comes here.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_here = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        if is_here and operation.overloadpacket.__name__ not in BETWEEN_DEVICES:
            others = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.ndim]
            assert not others, f"{operation} mixes tensors of two devices"
        if (device := kwargs.get("device")) is not None:
            # Torch makes tensors for ours on meta; a model without weights (`empty_model`) is really there.
            is_here = device.type == DEVICE.type or device.type == "meta" != torch.get_default_device().type
            kwargs["device"] = torch.device("cpu") if is_here else device
        results = operation(*tree_map(held, args), **tree_map(held, kwargs))
        given = {id(held(tensor)): tensor for tensor in tensors}

        def wrapped(result: Any) -> Any:
            if id(result) in given:  # of an operation in place
                return given[id(result)]
            return DeviceTensor(result) if is_here and isinstance(result, torch.Tensor) else result

        return tree_map(wrapped, results)


def without_lists(index: Any) -> Any:
    """An index with tensors on the CPU for lists: torch itself would make them on the meta device, with nothing in."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)


def held(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value
