"""The processes of a training: how they meet, exchange small values, and notice that one is lost.

Small values travel through torch's default group, gloo on the CPU, in float64 or integers, so that all processes take
the same decisions. A single process sends nothing, and importing this module does not load torch.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, TypeGuard

from lumiere.errors import LostProcessError, LumiereError, RankTimeoutError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a training run. All methods are collective: every process calls them in the same order.

    Attributes:
        rank: Of this process, from 0. Rank 0 writes and reports.
        size: Number of processes.
        local_rank: Of this process on its machine.
        local_size: Number of processes on its machine.
        job: Identifies this launch of torchrun and its arguments, through all restarts. None without torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    job: str | None = None

    @classmethod
    def from_environment(cls) -> ProcessGroup:
        """Return the group that torchrun describes in the environment, or `SINGLE_PROCESS`."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not all(os.environ.get(name, "").isdecimal() for name in names) or "MASTER_ADDR" not in os.environ:
            return cls()
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
        return cls(rank, size, local_rank, local_size)

    def all_reduce_tensor(self, values: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over all processes, with the same bits in each."""
        if self.size > 1:
            import torch.distributed as dist

            values = values.clone()
            dist.all_reduce(values)
        return values

    def all_reduce_sum(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        if self.size > 1:
            import torch

            value = self.all_reduce_tensor(torch.tensor(value, dtype=torch.float64)).item()
        return value

    def all_reduce_max(self, value: int) -> int:
        """Return the largest number of all processes."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            largest = torch.tensor(value)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            value = int(largest)
        return value

    def broadcast_text(self, text: str | None = None) -> str:
        """Return the text of rank 0; those of other ranks are ignored."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            data = (text or "").encode() if self.rank == 0 else b""
            length = torch.tensor(len(data))
            dist.broadcast(length, 0)
            characters = torch.empty(int(length), dtype=torch.uint8)
            if data:
                characters.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            if len(characters):
                dist.broadcast(characters, 0)
            text = characters.numpy().tobytes().decode()
        return text or ""

    def barrier(self) -> None:
        """Wait for all processes."""
        self.all_reduce_max(0)


SINGLE_PROCESS = ProcessGroup()


HEARTBEAT_SECONDS = 5.0
"""Time between two heartbeats of a process that sets up."""
HEARTBEAT_TIMEOUT = 120.0
"""Age in seconds of the last heartbeat after which a process that sets up counts as hung."""
STORE_TIMEOUT = timedelta(minutes=5)
"""Limit of one request to the store; requests do not wait for other processes."""
POLL_SECONDS = 0.1
"""Time between two polls of the store."""
ROLL_CALL_SECONDS = 5.0
"""How long the processes that timed out wait for each other, to find the missing ones."""
SECONDS_TO_BE_ENDED = 10.0
"""How long a process that lost another one waits for torchrun to end it; torchrun then names the lost one."""


class TorchrunGroup(ProcessGroup):
    """The processes that torchrun started, with the key-value store that they share.

    During setup, a process waits for another one as long as that one sends heartbeats: tokenizing a large corpus may
    take hours. Then `connect` creates torch's default group, whose operations have a timeout.

    Attributes:
        rank_timeout: That timeout in seconds; None before `connect`.
    """

    def __init__(self, processes: ProcessGroup, store: Store) -> None:
        super().__init__(processes.rank, processes.size, processes.local_rank, processes.local_size, processes.job)
        self.rank_timeout: float | None = None
        self._store = store
        self._num_beats = 0
        self._connected = threading.Event()

    def send_choice(self, text: str) -> None:
        """Send rank 0's choice of the run to the other ranks. Rank 0 calls this once."""
        self._store.set("choice 0", text)

    def receive_choice(self) -> str:
        """Wait for rank 0's choice.

        Raises:
            RankTimeoutError: Rank 0 sends no heartbeats.
        """
        self._wait_for("choice", [0])
        return self._store.get("choice 0").decode()

    def connect(self, rank_timeout: float) -> None:
        """Wait until all processes are set up, then create torch's default group.

        Args:
            rank_timeout: How long each of its operations waits for all processes, in seconds.

        Raises:
            RankTimeoutError: A process sends no heartbeats.
        """
        import torch.distributed as dist

        self._store.set(f"prepared {self.rank}", "")
        self._wait_for("prepared", range(self.size))
        self._connected.set()
        self.rank_timeout = rank_timeout
        timeout = timedelta(seconds=rank_timeout)
        dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=timeout)

    def beat(self) -> None:
        """Send one heartbeat."""
        self._num_beats += 1
        self._store.set(f"heartbeat {self.rank}", str(self._num_beats))

    def send_heartbeats(self) -> None:
        """Send heartbeats from a thread, until `connect` or the end of torchrun's store."""

        def send() -> None:
            with suppress(RuntimeError):
                while not self._connected.is_set():
                    self.beat()
                    self._connected.wait(HEARTBEAT_SECONDS)

        threading.Thread(target=send, daemon=True).start()

    def check_arrivals(self, timed_out: bool) -> None:
        """After an operation of the group failed, find the ranks that hang: those that do not call this too.

        Args:
            timed_out: This process waited too long. Otherwise another one has ended, or closed the connection when it
                timed out itself.

        Raises:
            RankTimeoutError: In the first process that timed out: ranks did not call this within `ROLL_CALL_SECONDS`.
        """
        keys = [f"failed {rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], str(timed_out))
        if not timed_out or self.rank_timeout is None:
            return
        deadline = time.monotonic() + ROLL_CALL_SECONDS
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        failed = {rank: self._store.get(key) for rank, key in enumerate(keys) if self._store.check([key])}
        is_first = self.rank == min(rank for rank, value in failed.items() if value == b"True")
        if is_first and (late := [rank for rank in range(self.size) if rank not in failed]):
            raise RankTimeoutError(
                f"{named(late, self.size)} did not arrive within training.rank_timeout ({self.rank_timeout:g} s)",
                "lumiere train --resume RUN continues from the last save; if these ranks are only slow, raise "
                "training.rank_timeout",
            )

    def _wait_for(self, event: str, ranks: Collection[int]) -> None:
        """Wait until each of `ranks` has set its key of `event`, while the missing ones send heartbeats."""
        # By this machine's clock: clocks of several machines differ.
        beats: dict[int, tuple[bytes, float]] = {}
        while not self._store.check([f"{event} {rank}" for rank in ranks]):
            now = time.monotonic()
            missing = [rank for rank in ranks if not self._store.check([f"{event} {rank}"])]
            for rank in missing:
                key = f"heartbeat {rank}"
                beat = self._store.get(key) if self._store.check([key]) else b""
                if rank not in beats or beats[rank][0] != beat:
                    beats[rank] = beat, now
            if silent := [rank for rank in missing if now - beats[rank][1] > HEARTBEAT_TIMEOUT]:
                raise RankTimeoutError(
                    f"{named(silent, self.size)} sent no heartbeat for {HEARTBEAT_TIMEOUT:g} s while the processes "
                    "prepared",
                    "look for a stopped process or a file system that does not answer on its machine",
                )
            time.sleep(POLL_SECONDS)


@contextmanager
def joined(purpose: str = "") -> Iterator[ProcessGroup]:
    """Context in which this process has joined those that torchrun started; `SINGLE_PROCESS` without torchrun.

    Args:
        purpose: What to train. Another purpose in the same launch is another `job`.

    Raises:
        LostProcessError: Another process ended or hung while this one waited for it.
    """
    processes = ProcessGroup.from_environment()
    if processes.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        yield processes
        return
    import torch.distributed as dist

    if processes.size > 1:
        share_cores(processes)
    try:
        with noticing_losses(processes):
            processes = meet(processes, purpose)
        with noticing_losses(processes):  # by what the processes share now
            yield processes
    except Exception as error:
        # What rank 0 says suffices where all have the same error, and torchrun names the process that ended first:
        # it soon ends this one, as nothing handles its signal here. It knows nothing of a process that hangs.
        if not isinstance(error, RankTimeoutError) and (processes.rank or isinstance(error, LostProcessError)):
            time.sleep(SECONDS_TO_BE_ENDED)
        if processes.rank and isinstance(error, LumiereError):
            raise type(error)(f"process {processes.rank} of {processes.size}: {error.message}", error.hint) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def meet(processes: ProcessGroup, purpose: str) -> ProcessGroup:
    """Connect to torchrun's store, and start to send heartbeats."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    shared, _, _ = next(rendezvous("env://", timeout=STORE_TIMEOUT))
    job = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun keeps one store for all its starts (torch 2.9 to 2.13), so the token of the first start stays.
        token = shared.compare_set("lumiere job", "", secrets.token_hex(16))
        job = hashlib.blake2b(token + purpose.encode(), digest_size=16).hexdigest()
    # A prefix of this start: else a process may read the address of one that died in the start before.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    processes = replace(processes, job=job)
    if processes.size == 1:
        return processes
    joined_group = TorchrunGroup(processes, PrefixStore(f"lumiere start {start}", shared))
    joined_group.send_heartbeats()
    return joined_group


@contextmanager
def noticing_losses(processes: ProcessGroup) -> Iterator[None]:
    """Context that translates torch's errors about lost processes.

    Raises:
        RankTimeoutError: Other processes did not arrive in time; only the first one that did arrive raises it.
        LostProcessError: Another process ended while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo has no class of its own for it; its messages name its source files.
        if processes.size == 1 or not ("Dist" in type(error).__name__ or "gloo" in str(error)):
            raise
        if isinstance(processes, TorchrunGroup):
            with suppress(RuntimeError):  # the store is gone too
                processes.check_arrivals(timed_out=any(word in str(error).lower() for word in ("timed out", "timeout")))
        raise LostProcessError(
            f"another of the {processes.size} processes has ended, or cannot be reached",
            "torchrun says which; resume with lumiere train --resume RUN",
        ) from error


def named(ranks: Sequence[int], size: int) -> str:
    """`rank 1 of 2`, or `ranks 1 and 3 of 4`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} of {size}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} of {size}"


def share_cores(processes: ProcessGroup) -> None:
    """Use this process' share of the machine's cores instead of the single thread that torchrun sets.

    torchrun sets OMP_NUM_THREADS=1 if the user has set nothing, indistinguishable from a user's 1. Any other number is
    the user's and stays.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1":
        import torch

        torch.set_num_threads(max(1, num_cores() // processes.local_size))


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether the tensor is sharded over processes."""
    # By an attribute: importing the class takes half a second, which a single process need not spend.
    return hasattr(tensor, "device_mesh")


def rows_of(length: int, rank: int, size: int) -> slice:
    """Return the rows of a tensor that a process holds: those of `torch.chunk`, as in FSDP2."""
    each = -(-length // size)
    return slice(min(rank * each, length), min((rank + 1) * each, length))
