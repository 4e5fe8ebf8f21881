"""Training one model by several processes: DDP and FSDP2, and tensors that are sharded by rows.

DDP (Li et al. 2020, "PyTorch Distributed"): each process has all weights and computes the gradients of its share of a
batch. Torch sums them while the backward pass runs, so every process makes the same update.

FSDP (Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023, "PyTorch FSDP"): each process keeps its rows of every
weight and of its optimizer state, as DTensors. Torch gathers a block's weights when the block is computed, forward and
backward, and gives each process the summed gradients of its rows.

With one process no tensor is sharded, and the functions on DTensors pass plain tensors through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Size, Tensor, nn

from lumiere.distributed import ProcessGroup, TorchrunGroup, is_dtensor, rows_of
from lumiere.errors import CheckpointError, LumiereError
from lumiere.models.transformer import Transformer
from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint
from lumiere.persistence.manifest import DAMAGE_HINT
from lumiere.training.loss import BatchLoss, Objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as TorchProcessGroup
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


WATCHDOG_MARGIN = 60.0
"""Seconds by which torch's watchdog for GPUs waits longer than the processes themselves."""


def local_device(device: torch.device, processes: ProcessGroup) -> torch.device:
    """Return the device of this process: with several processes on a machine, the GPU of its local rank.

    Raises:
        LumiereError: There are too few GPUs, or processes cannot share this kind of device.
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
    """Seed torch's generators for a step, such that ranks draw different masks and a resumed rank the same ones.

    A single process keeps its generator, whose state is in its checkpoints.
    """
    if processes.size > 1:
        digest = hashlib.blake2b(f"dropout {seed} {step} {processes.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class DdpObjective:
    """An objective whose gradients, after the backward pass, are summed over all processes.

    The parameters stay the model's own, so that names and checkpoints do not change.
    """

    def __init__(self, model: Transformer, objective: Objective, device: torch.device, processes: ProcessGroup) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self.module = DistributedDataParallel(
            BatchLoss(model, objective), process_group=gradient_group(device, processes)
        )
        self._size = processes.size

    def __call__(self, model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.module(tokens, targets)
        # DDP averages over the processes, but the objective is a sum.
        loss.register_hook(lambda gradient: gradient * self._size)
        return loss


class FsdpObjective:
    """An objective that shards the weights of a model; the gradients are this process' rows of the sums.

    Gradients are summed in every part of a batch: otherwise each process would keep gradients of all weights.
    """

    def __init__(self, model: Transformer, objective: Objective, device: torch.device, processes: ProcessGroup) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(gradient_group(device, processes), device.type)
        module = BatchLoss(model, objective)
        # The embedding and the last norm belong to the module itself: they are needed throughout.
        for part in (*model.blocks, module):
            sharded = fully_shard(part, mesh=mesh)
            # A sum instead of FSDP's mean. Gloo cannot multiply while it reduces, which another factor would need.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        self.module = cast("FSDPModule", module)

    def __call__(self, model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
        return cast("nn.Module", self.module)(tokens, targets)


def parallelize(
    model: Transformer,
    objective: Objective,
    parallel: Literal["ddp", "fsdp"],
    device: torch.device,
    processes: ProcessGroup,
) -> Objective:
    """Move the model, or this process' shard of it, to the device; return the objective that sums gradients.

    With one process that is `objective` itself.
    """
    if processes.size > 1 and parallel == "fsdp":
        return FsdpObjective(model, objective, device, processes)
    model.to(device)
    return objective if processes.size == 1 else DdpObjective(model, objective, device, processes)


def gradient_group(device: torch.device, processes: ProcessGroup) -> TorchProcessGroup:
    """Return torch's process group for gradients on this kind of device."""
    import torch.distributed as dist

    # On CPUs the default group suffices: each further group is another round of connections, which can fail.
    if device.type != "cuda":
        return cast("TorchProcessGroup", dist.group.WORLD)
    # Longer than the default group, whose timeout names the ranks that hang; torch's watchdog for nccl only aborts.
    limit = processes.rank_timeout if isinstance(processes, TorchrunGroup) else None
    timeout = None if limit is None else timedelta(seconds=limit + WATCHDOG_MARGIN)
    return cast("TorchProcessGroup", dist.new_group(backend="nccl", timeout=timeout))


def accumulating(objective: Objective, is_last: bool) -> AbstractContextManager[None]:
    """Context of the forward pass of one part of a batch. With DDP, only the last part's backward pass sums."""
    return objective.module.no_sync() if isinstance(objective, DdpObjective) and not is_last else nullcontext()


@contextmanager
def evaluating(objective: Objective) -> Iterator[None]:
    """Context in which other methods of the model than the objective can be called."""
    module = objective.module if isinstance(objective, FsdpObjective) else None
    if module is not None:
        module.unshard()
    try:
        yield
    finally:
        if module is not None:
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all rows of a tensor. Collective: every process must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def distribute_like(value: Tensor, reference: Tensor) -> Tensor:
    """Copy `value` to the device of `reference`, sharded like it.

    Args:
        value: Full, and the same in all processes; or sharded already.
    """
    if not is_dtensor(reference) or is_dtensor(value):
        return value.to(reference.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    # Nothing is sent. Cloned, because a view would keep all rows alive.
    value = value.to(reference.device)
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None).clone()


def from_rows(rows: Tensor, reference: DTensor) -> DTensor:
    """Return the tensor, sharded like `reference`, of which this process holds `rows`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows,
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load full or sharded weights into a model that may be sharded.

    Raises:
        RuntimeError: As `load_state_dict`.
    """
    mine = model.state_dict()
    model.load_state_dict(
        {name: distribute_like(weight, mine[name]) if name in mine else weight for name, weight in weights.items()}
    )


def gather_checkpoint(checkpoint: Checkpoint, processes: ProcessGroup) -> Checkpoint:
    """Return the checkpoint with full tensors on rank 0 and with none on the others. Collective.

    The other ranks hold one full tensor at a time.
    """

    tensors = {}
    for name, tensor in checkpoint.tensors().items():
        all_rows = full_tensor(tensor)
        if processes.rank == 0:
            tensors[name] = all_rows.cpu()
    return Checkpoint.of_tensors(tensors, checkpoint.metadata)


def local_rows(checkpoint: Checkpoint, model: nn.Module, processes: ProcessGroup) -> Checkpoint:
    """Return the checkpoint; if its numbers are still in its folder, with this process' rows of them. Collective.

    Raises:
        CheckpointError: This or another process cannot read its part.
    """
    if checkpoint.folder is None:
        return checkpoint
    sharded: dict[str, DTensor] = {}
    for name, outline in checkpoint.tensors().items():
        for key, weight in model.state_dict().items():
            # `optimizer.<weight>.exp_avg`, or `optimizer.trained.<weight>`.
            if f".{key}." in f"{name}." and weight.shape == outline.shape and is_dtensor(weight):
                sharded[name] = weight

    def rows(name: str, shape: tuple[int, ...]) -> slice:
        mesh = sharded[name].device_mesh if name in sharded else None
        return slice(None) if mesh is None else rows_of(shape[0], mesh.get_local_rank(), mesh.size())

    found, problem = None, None
    try:
        found = load_checkpoint(checkpoint.folder, rows=rows)
    except CheckpointError as error:
        problem = error
    failed = processes.all_reduce_max(0 if found else processes.rank + 1)
    if found is None or failed:
        raise problem or CheckpointError(f"process {failed - 1} cannot read its part of the checkpoint", DAMAGE_HINT)
    tensors = found.tensors()
    for name, like in sharded.items():
        tensors[name] = from_rows(tensors[name].to(like.device), like)
    return Checkpoint.of_tensors(tensors, found.metadata)


def nbytes(checkpoint: Checkpoint) -> int:
    """Return the size of all full tensors of a checkpoint."""
    return sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.tensors().values())


def apply_to_full(function: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Return `function(tensors)` for a function of full tensors that returns one of the same shape for each.

    If they are sharded, tensor i is sent to process i modulo their number, which calls `function`; the result is sent
    back. Each process does its share of the work, and holds no more full tensors than its share.
    """
    if not tensors or not is_dtensor(tensors[0]):
        return function(tensors)

    sharded = cast("list[DTensor]", tensors)
    mesh = sharded[0].device_mesh
    rank, size, group = mesh.get_local_rank(), mesh.size(), mesh.get_group()
    # By owner, my rows of its tensors; and by process, its rows of mine.
    sent = [[tensor.to_local() for tensor in sharded[owner::size]] for owner in range(size)]
    shapes = [[shard_shape(tensor.shape, other, size) for tensor in sharded[rank::size]] for other in range(size)]
    full = [torch.cat(parts) for parts in zip(*exchange(sent, shapes, group), strict=True)]
    results = function(full)
    answers = [[result[rows_of(len(result), other, size)] for result in results] for other in range(size)]
    answered = exchange(answers, [[tensor.shape for tensor in theirs] for theirs in sent], group)
    found = list(tensors)
    for owner, theirs in enumerate(answered):
        for place, rows in zip(range(owner, len(sharded), size), theirs, strict=True):
            found[place] = from_rows(rows, sharded[place])
    return found


def exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Size]], group: TorchProcessGroup
) -> list[list[Tensor]]:
    """Send tensors to each process; return what each sends to this one, of the given shapes."""
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


def shard_shape(shape: Size, rank: int, size: int) -> Size:
    """Return the shape of a process' shard of a tensor."""
    rows = rows_of(shape[0], rank, size)
    return Size((rows.stop - rows.start, *shape[1:]))
