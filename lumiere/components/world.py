"""Which of the processes that compute together this one is, and what they say to each other besides gradients.

All of it goes through torch's default group, which is one of gloo on the CPU, in float64 or in whole numbers, so that
every process comes to the same decisions. In a world of one nothing is sent and torch is not loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes of a training.

    Every process must call the methods in the same order: each one waits for all the others.

    Attributes:
        rank: of this process, counted from 0; 0 is the one that writes and talks.
        size: processes in all.
        local_rank: of this process among those of its machine.
        local_size: processes of its machine.
        job: names this launch of torchrun and what it trains, through all its restarts; None without torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    job: str | None = None

    @classmethod
    def of_environment(cls) -> World:
        """The world that torchrun describes in the environment; a world of one without it."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not all(os.environ.get(name, "").isdecimal() for name in names) or "MASTER_ADDR" not in os.environ:
            return cls()
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
        return cls(rank, size, local_rank, local_size)

    def add(self, values: Tensor) -> Tensor:
        """The sum of a tensor on the CPU over all processes, the same bits in each."""
        if self.size > 1:
            import torch.distributed as dist

            values = values.clone()
            dist.all_reduce(values)
        return values

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.size > 1:
            import torch

            value = self.add(torch.tensor(value, dtype=torch.float64)).item()
        return value

    def largest(self, value: int) -> int:
        """The largest of the processes' numbers."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            largest = torch.tensor(value)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            value = int(largest)
        return value

    def announce(self, text: str | None = None) -> str:
        """The text that rank 0 gives; the others give none."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            data = (text or "").encode()
            length = torch.tensor(len(data))
            dist.broadcast(length, 0)
            characters = torch.empty(int(length), dtype=torch.uint8)
            if data:
                characters.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            if len(characters):
                dist.broadcast(characters, 0)
            text = characters.numpy().tobytes().decode()
        return text or ""

    def copy_from_first(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor on the CPU by that of rank 0."""
        if self.size > 1 and tensor.numel():
            import torch.distributed as dist

            dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all processes have come here."""
        self.largest(0)


ALONE = World()
