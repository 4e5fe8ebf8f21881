"""Several processes that train one model: how their gradients become one.

Data parallel (Li et al. 2020, "PyTorch Distributed"): each process has all weights and computes the gradients of its
share of a batch; torch's DDP sums them while the backward pass still runs. So every process makes the same update.
"""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from torch import Tensor, nn

from lumiere.components.world import World
from lumiere.errors import LumiereError
from lumiere.models.transformer import Transformer
from lumiere.training.loss import Objective

GRADIENTS_TIMEOUT = timedelta(minutes=30)
"""How long a GPU waits for the gradients of the others."""


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


class BatchLoss(nn.Module):
    """The loss as a module's forward pass, which is the only thing that DDP watches."""

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self._objective(self.model, tokens, targets)


class SharedObjective:
    """An objective whose gradients, after the backward pass, are the sum of those of all processes.

    The parameters are those of the model itself, so that its names and its checkpoints know nothing of it.
    """

    def __init__(self, model: Transformer, objective: Objective, device: torch.device, world: World) -> None:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        # On CPUs the default group will do: each further one is another round of connections, which can fail.
        group = dist.new_group(backend="nccl", timeout=GRADIENTS_TIMEOUT) if device.type == "cuda" else None
        self._module = DistributedDataParallel(BatchLoss(model, objective), process_group=group)
        self._size = world.size

    def __call__(self, model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self._module(tokens, targets)
        # DDP gives the mean over the processes, and the objective is a sum.
        loss.register_hook(lambda gradient: gradient * self._size)
        return loss

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Around the forward pass of a part of a batch: the last one's backward pass sums the gradients of all."""
        return nullcontext() if is_last else self._module.no_sync()


def distributed(model: Transformer, objective: Objective, device: torch.device, world: World) -> Objective:
    """The objective whose gradients are those of all processes' shares; itself where there is one process."""
    return objective if world.size == 1 else SharedObjective(model, objective, device, world)


def accumulating(objective: Objective, is_last: bool) -> AbstractContextManager[None]:
    """Around the forward pass of a part of a batch, for any objective."""
    return objective.accumulating(is_last) if isinstance(objective, SharedObjective) else nullcontext()
