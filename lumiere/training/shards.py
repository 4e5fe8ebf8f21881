"""Tensors that are shared out among the processes of a training: each one keeps some of the rows (FSDP's DTensors).

In a training by one process nothing is shared out, and every function here is what its name says of plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Size, Tensor, nn

from lumiere.components.world import World
from lumiere.errors import CheckpointError
from lumiere.persistence.checkpoint import DAMAGE_HINT, GROUPS, Checkpoint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def is_shared_out(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process has some of its rows only."""
    # By an attribute: to import the class takes half a second, which one process alone need not wait.
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """All of its rows. Every process must ask for them."""
    return tensor.full_tensor() if is_shared_out(tensor) else tensor


def like(value: Tensor, reference: Tensor) -> Tensor:
    """A copy of `value` on the device of `reference`, and shared out as it is.

    Args:
        value: whole, and the same in all processes; or shared out already.
    """
    if not is_shared_out(reference) or is_shared_out(value):
        return value.to(reference.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    # Nothing is sent. The copy, because a view would keep all rows alive.
    value = value.to(reference.device)
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None).clone()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict`, whether or not the model's weights are shared out.

    Raises:
        RuntimeError: as `load_state_dict`.
    """
    mine = model.state_dict()
    model.load_state_dict(
        {name: like(weight, mine[name]) if name in mine else weight for name, weight in weights.items()}
    )


def gathered(checkpoint: Checkpoint, world: World) -> Checkpoint:
    """The checkpoint with whole tensors in the process that writes, rank 0, and with none in the others.

    Every process must call it. One tensor at a time is whole in the others.
    """

    def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            all_rows = whole(tensor)
            if world.rank == 0:
                found[name] = all_rows.cpu()
        return found

    return Checkpoint(*(gather(getattr(checkpoint, group)) for group in GROUPS), metadata=checkpoint.metadata)


def own_rows(checkpoint: Checkpoint, model: nn.Module, world: World) -> Checkpoint:
    """The checkpoint itself; of one whose numbers are still in its folder, this process' rows of them.

    Every process must call it.

    Raises:
        CheckpointError: this or another process cannot read its part.
    """
    if checkpoint.folder is None:
        return checkpoint
    from lumiere.persistence.sharded import load_shards

    weights = model.state_dict()

    def memory(name: str, shape: Size, dtype: torch.dtype) -> Tensor:
        """As the weight that a tensor is about: `optimizer.<weight>.exp_avg`, or `optimizer.trained.<weight>`."""
        for weight, tensor in weights.items():
            if f".{weight}." in f"{name}." and tensor.shape == shape:
                return torch.empty_like(tensor, dtype=dtype)
        return torch.empty(shape, dtype=dtype)

    found, problem = None, None
    try:
        found = load_shards(checkpoint.folder, like=memory)
    except CheckpointError as error:
        problem = error
    failed = world.largest(0 if found else world.rank + 1)
    if found is None or failed:
        raise problem or CheckpointError(f"process {failed - 1} cannot read its part of the checkpoint", DAMAGE_HINT)
    return found


def held_bytes(checkpoint: Checkpoint) -> int:
    """Of all tensors, whole."""
    tensors = [tensor for group in GROUPS for tensor in getattr(checkpoint, group).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def apply_to_whole(function: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """`function(tensors)`, for a function that needs all rows of a tensor and gives one of the same shape for each.

    Where they are shared out, tensor i goes to process i modulo their number, which calls `function`, and what comes of
    it comes back: each process does its share of the work, and holds no more whole tensors than its share.
    """
    if not tensors or not is_shared_out(tensors[0]):
        return function(tensors)
    from torch.distributed.tensor import DTensor

    sharded = cast("list[DTensor]", tensors)
    mesh = sharded[0].device_mesh
    rank, size, group = mesh.get_local_rank(), mesh.size(), mesh.get_group()
    # By owner, what I have of its tensors; and by process, what it has of mine.
    sent = [[tensor.to_local() for tensor in sharded[owner::size]] for owner in range(size)]
    shapes = [[shard_shape(tensor.shape, other, size) for tensor in sharded[rank::size]] for other in range(size)]
    wholes = [torch.cat(parts) for parts in zip(*exchange(sent, shapes, group), strict=True)]
    results = function(wholes)
    answers = [[result[rows_of(len(result), other, size)] for result in results] for other in range(size)]
    answered = exchange(answers, [[tensor.shape for tensor in theirs] for theirs in sent], group)
    found = list(tensors)
    for owner, theirs in enumerate(answered):
        for place, rows in zip(range(owner, len(sharded), size), theirs, strict=True):
            of = sharded[place]
            found[place] = DTensor.from_local(
                rows, mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
            )
    return found


def exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Size]], group: ProcessGroup
) -> list[list[Tensor]]:
    """What each process sends to this one, of the given shapes, for what this one sends to each: by process."""
    import torch.distributed as dist

    sizes = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    flat = torch.cat([tensor.reshape(-1) for tensors in sent for tensor in tensors])
    expected = [sum(shape.numel() for shape in of_one) for of_one in shapes]
    received = flat.new_empty(sum(expected))
    dist.all_to_all_single(received, flat, expected, sizes, group)
    return [
        [rows.view(shape) for rows, shape in zip(part.split([s.numel() for s in of_one]), of_one, strict=True)]
        for part, of_one in zip(received.split(expected), shapes, strict=True)
    ]


def rows_of(length: int, rank: int, size: int) -> slice:
    """The rows that a process has of a tensor of that length: those of `torch.chunk`, as FSDP2 shares out."""
    each = -(-length // size)
    return slice(min(rank * each, length), min((rank + 1) * each, length))


def shard_shape(shape: Size, rank: int, size: int) -> Size:
    """The shape of what a process has of a tensor."""
    rows = rows_of(shape[0], rank, size)
    return Size((rows.stop - rows.start, *shape[1:]))
