"""Several processes that train one model: how their gradients become one.

Data parallel (Li et al. 2020, "PyTorch Distributed"): each process has all weights and computes the gradients of its
share of a batch; torch's DDP sums them while the backward pass still runs. So every process makes the same update.

Fully sharded (Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023, "PyTorch FSDP"): each process keeps its rows
of every weight, and of what the optimizer keeps of it. Torch's FSDP2 puts a block's weights together when the block is
computed, forward and backward, and gives each process the sum of the gradients of its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeGuard, cast

import torch
from torch import Size, Tensor, nn

from lumiere.distributed import ProcessGroup, TorchrunGroup
from lumiere.errors import CheckpointError, LumiereError
from lumiere.models.transformer import Transformer
from lumiere.persistence.checkpoint import DAMAGE_HINT, GROUPS, Checkpoint
from lumiere.training.loss import BatchLoss, Objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as TorchProcessGroup
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


WATCHDOG_MARGIN = 60.0
"""How many seconds later than the processes themselves torch's watchdog gives up a GPU's wait for the others."""


def own_device(device: torch.device, processes: ProcessGroup) -> torch.device:
    """The device of this process: of several on one machine, each has the GPU of its own number.

    Raises:
        LumiereError: there are not enough of them, or processes cannot share that kind.
    """
    if processes.size == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise LumiereError(
            f"several processes train on cpu or cuda, not on {device.type}", "start one, or --set training.device=cpu"
        )
    if processes.local_rank >= torch.cuda.device_count():
        raise LumiereError(
            f"{processes.local_size} processes on a machine with {torch.cuda.device_count()} GPUs",
            "start one for each GPU, or --set training.device=cpu",
        )
    own = torch.device("cuda", processes.local_rank)
    torch.cuda.set_device(own)
    return own


def seed_dropout(seed: int, step: int, processes: ProcessGroup) -> None:
    """Seed torch's generators for a step: each process drops something else, and a resumed one the same again.

    One process alone draws on from where it is, and its checkpoints keep where that was.
    """
    if processes.size > 1:
        digest = hashlib.blake2b(f"dropout {seed} {step} {processes.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class SharedObjective:
    """An objective whose gradients, after the backward pass, are the sum of those of all processes.

    The parameters are those of the model itself, so that its names and its checkpoints know nothing of it.
    """

    def __init__(self, model: Transformer, objective: Objective, device: torch.device, processes: ProcessGroup) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self._module = DistributedDataParallel(
            BatchLoss(model, objective), process_group=gradient_group(device, processes)
        )
        self._size = processes.size

    def __call__(self, model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self._module(tokens, targets)
        # DDP gives the mean over the processes, and the objective is a sum.
        loss.register_hook(lambda gradient: gradient * self._size)
        return loss

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Around the forward pass of a part of a batch: the last one's backward pass sums the gradients of all."""
        return nullcontext() if is_last else self._module.no_sync()


class ShardedObjective:
    """An objective of a model whose weights it shares out, and whose gradients are this process' rows of the sums.

    Every part of a batch has its gradients summed: otherwise each process would keep gradients of all weights.
    """

    def __init__(self, model: Transformer, objective: Objective, device: torch.device, processes: ProcessGroup) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(gradient_group(device, processes), device.type)
        module = BatchLoss(model, objective)
        # The embedding and the last norm belong to the module itself: they are needed from the beginning to the end.
        for part in (*model.blocks, module):
            sharded = fully_shard(part, mesh=mesh)
            # A sum, and not FSDP's mean. Gloo cannot do the multiplication on the way that a factor asks for.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        self._module = cast("FSDPModule", module)

    def __call__(self, model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
        return cast("nn.Module", self._module)(tokens, targets)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside of it, methods of the model may be called that are not the objective."""
        self._module.unshard()
        try:
            yield
        finally:
            self._module.reshard()


def distributed(
    model: Transformer,
    objective: Objective,
    parallel: Literal["ddp", "fsdp"],
    device: torch.device,
    processes: ProcessGroup,
) -> Objective:
    """The objective whose gradients are those of all processes' shares; itself where there is one process.

    The model comes from the CPU, and goes to this process' device: all of it, or this process' share.
    """
    if processes.size > 1 and parallel == "fsdp":
        return ShardedObjective(model, objective, device, processes)
    model.to(device)
    return objective if processes.size == 1 else SharedObjective(model, objective, device, processes)


def gradient_group(device: torch.device, processes: ProcessGroup) -> TorchProcessGroup:
    """The processes, by what the device can send gradients with."""
    import torch.distributed as dist

    # On CPUs the default group will do: each further one is another round of connections, which can fail.
    if device.type != "cuda":
        return cast("TorchProcessGroup", dist.group.WORLD)
    # Later than the default group, whose time-out names the ranks that hang; torch's watchdog for nccl only aborts.
    limit = processes.rank_timeout if isinstance(processes, TorchrunGroup) else None
    timeout = None if limit is None else timedelta(seconds=limit + WATCHDOG_MARGIN)
    return cast("TorchProcessGroup", dist.new_group(backend="nccl", timeout=timeout))


def accumulating(objective: Objective, is_last: bool) -> AbstractContextManager[None]:
    """Around the forward pass of a part of a batch, for any objective."""
    return objective.accumulating(is_last) if isinstance(objective, SharedObjective) else nullcontext()


def evaluating(objective: Objective) -> AbstractContextManager[None]:
    """Around what a training does with its model besides the objective."""
    return objective.evaluating() if isinstance(objective, ShardedObjective) else nullcontext()


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process has some of its rows only."""
    # By an attribute: to import the class takes half a second, which one process alone need not wait.
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of its rows. Every process must ask for them."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def distribute_like(value: Tensor, reference: Tensor) -> Tensor:
    """A copy of `value` on the device of `reference`, and shared out as it is.

    Args:
        value: whole, and the same in all processes; or shared out already.
    """
    if not is_dtensor(reference) or is_dtensor(value):
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
        {name: distribute_like(weight, mine[name]) if name in mine else weight for name, weight in weights.items()}
    )


def gather_checkpoint(checkpoint: Checkpoint, processes: ProcessGroup) -> Checkpoint:
    """The checkpoint with whole tensors in the process that writes, rank 0, and with none in the others.

    Every process must call it. One tensor at a time is whole in the others.
    """

    def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            all_rows = full_tensor(tensor)
            if processes.rank == 0:
                found[name] = all_rows.cpu()
        return found

    return Checkpoint(*(gather(getattr(checkpoint, group)) for group in GROUPS), metadata=checkpoint.metadata)


def local_rows(checkpoint: Checkpoint, model: nn.Module, processes: ProcessGroup) -> Checkpoint:
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
    failed = processes.all_reduce_max(0 if found else processes.rank + 1)
    if found is None or failed:
        raise problem or CheckpointError(f"process {failed - 1} cannot read its part of the checkpoint", DAMAGE_HINT)
    return found


def nbytes(checkpoint: Checkpoint) -> int:
    """Of all tensors, whole."""
    tensors = [tensor for group in GROUPS for tensor in getattr(checkpoint, group).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def apply_to_full(function: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """`function(tensors)`, for a function that needs all rows of a tensor and gives one of the same shape for each.

    Where they are shared out, tensor i goes to process i modulo their number, which calls `function`, and what comes of
    it comes back: each process does its share of the work, and holds no more whole tensors than its share.
    """
    if not tensors or not is_dtensor(tensors[0]):
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
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Size]], group: TorchProcessGroup
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
