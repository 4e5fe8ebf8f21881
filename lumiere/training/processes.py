"""How the processes of a training meet and part. Importing this module does not load torch."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from lumiere.components.world import World
from lumiere.errors import LostProcessError, LumiereError

PREPARING_TIMEOUT = timedelta(days=1)
"""How long the others wait for the one that is slowest: to encode a large corpus, or to evaluate."""
SECONDS_TO_BE_ENDED = 10.0
"""How long a process that has lost another one waits for torchrun to end it, which then names the one that was lost."""


@contextmanager
def joined() -> Iterator[World]:
    """Inside of it, this process is one of those that torchrun started; alone, nothing is done.

    Raises:
        LostProcessError: another one has ended while this one waited for it.
    """
    world = World.of_environment()
    if world.size == 1:
        yield world
        return
    import torch.distributed as dist

    share_cores(world)
    try:
        with noticing_losses(world):
            meet(world)
            yield world
    except Exception as error:
        # What rank 0 says suffices where all have the same error, and torchrun names the process that ended first:
        # it soon ends this one, as nothing handles its signal here.
        if world.rank or isinstance(error, LostProcessError):
            time.sleep(SECONDS_TO_BE_ENDED)
        if world.rank and isinstance(error, LumiereError):
            raise type(error)(f"process {world.rank} of {world.size}: {error.message}", error.hint) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def meet(world: World) -> None:
    """Make torch's default group."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=PREPARING_TIMEOUT))
    # torchrun keeps one store for all its starts (torch 2.13): without a prefix of this start, a process may read the
    # address of one that died in the start before, and be refused there.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"lumiere start {start}", store)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=PREPARING_TIMEOUT)


@contextmanager
def noticing_losses(world: World) -> Iterator[None]:
    """Inside of it, an error of torch which means that another process is gone is one that says so.

    Raises:
        LostProcessError: another process has ended while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo has no class of its own for it; its messages name its source files.
        if world.size == 1 or not ("Dist" in type(error).__name__ or "gloo" in str(error)):
            raise
        raise LostProcessError(
            f"another of the {world.size} processes has ended, or cannot be reached",
            "torchrun says which; lumiere train --resume RUN goes on from what was saved",
        ) from error


def share_cores(world: World) -> None:
    """Give this process its share of the machine's cores, in place of the one thread that torchrun sets.

    torchrun sets OMP_NUM_THREADS=1 where the user has set nothing, which looks like a user's 1. Any other number is
    the user's and stays.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1":
        import torch

        torch.set_num_threads(max(1, num_cores() // world.local_size))


def num_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
