"""Several processes that train one model: how their gradients become one.

Data parallel (Li et al. 2020, "PyTorch Distributed"): each process has all weights and computes the gradients of its
share of a batch; torch's DDP sums them while the backward pass still runs. So every process makes the same update.

Fully sharded (Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023, "PyTorch FSDP"): each process keeps its rows
of every weight, and of what the optimizer keeps of it. Torch's FSDP2 puts a block's weights together when the block is
computed, forward and backward, and gives each process the sum of the gradients of its rows.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from lumiere.components.world import World
from lumiere.errors import LumiereError
from lumiere.models.transformer import Transformer
from lumiere.training.loss import BatchLoss, Objective
from lumiere.training.processes import JoinedWorld

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.fsdp import FSDPModule

WATCHDOG_MARGIN = 60.0
"""How many seconds later than the processes themselves torch's watchdog gives up a GPU's wait for the others."""


def own_device(device: torch.device, world: World) -> torch.device:
    """The device of this process: of several on one machine, each has the GPU of its own number.

    Raises:
        LumiereError: there are not enough of them, or processes cannot share that kind.
    """
    if world.size == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise LumiereError(
            f"several processes train on cpu or cuda, not on {device.type}", "start one, or --set training.device=cpu"
        )
    if world.local_rank >= torch.cuda.device_count():
        raise LumiereError(
            f"{world.local_size} processes on a machine with {torch.cuda.device_count()} GPUs",
            "start one for each GPU, or --set training.device=cpu",
        )
    own = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(own)
    return own


def seed_dropout(seed: int, step: int, world: World) -> None:
    """Seed torch's generators for a step: each process drops something else, and a resumed one the same again.

    One process alone draws on from where it is, and its checkpoints keep where that was.
    """
    if world.size > 1:
        digest = hashlib.blake2b(f"dropout {seed} {step} {world.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class SharedObjective:
    """An objective whose gradients, after the backward pass, are the sum of those of all processes.

    The parameters are those of the model itself, so that its names and its checkpoints know nothing of it.
    """

    def __init__(self, model: Transformer, objective: Objective, device: torch.device, world: World) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self._module = DistributedDataParallel(BatchLoss(model, objective), process_group=gradient_group(device, world))
        self._size = world.size

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

    def __init__(self, model: Transformer, objective: Objective, device: torch.device, world: World) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(gradient_group(device, world), device.type)
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
    model: Transformer, objective: Objective, parallel: Literal["ddp", "fsdp"], device: torch.device, world: World
) -> Objective:
    """The objective whose gradients are those of all processes' shares; itself where there is one process.

    The model comes from the CPU, and goes to this process' device: all of it, or this process' share.
    """
    if world.size > 1 and parallel == "fsdp":
        return ShardedObjective(model, objective, device, world)
    model.to(device)
    return objective if world.size == 1 else SharedObjective(model, objective, device, world)


def gradient_group(device: torch.device, world: World) -> "ProcessGroup":
    """The processes, by what the device can send gradients with."""
    import torch.distributed as dist

    # On CPUs the default group will do: each further one is another round of connections, which can fail.
    if device.type != "cuda":
        return cast("ProcessGroup", dist.group.WORLD)
    # Later than the default group, whose time-out names the ranks that hang; torch's watchdog for nccl only aborts.
    limit = world.rank_timeout if isinstance(world, JoinedWorld) else None
    timeout = None if limit is None else timedelta(seconds=limit + WATCHDOG_MARGIN)
    return cast("ProcessGroup", dist.new_group(backend="nccl", timeout=timeout))


def accumulating(objective: Objective, is_last: bool) -> AbstractContextManager[None]:
    """Around the forward pass of a part of a batch, for any objective."""
    return objective.accumulating(is_last) if isinstance(objective, SharedObjective) else nullcontext()


def evaluating(objective: Objective) -> AbstractContextManager[None]:
    """Around what a training does with its model besides the objective."""
    return objective.evaluating() if isinstance(objective, ShardedObjective) else nullcontext()
