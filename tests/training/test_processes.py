"""How processes wait for each other by the store of torchrun: here one in memory, and a clock that no one waits for."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
from torch._C._distributed_c10d import HashStore

from lumiere import distributed
from lumiere.distributed import HEARTBEAT_TIMEOUT, SINGLE_PROCESS, ProcessGroup, TorchrunGroup, joined, noticing_losses
from lumiere.errors import LostProcessError, RankTimeoutError
from lumiere.persistence.runs import RunStore
from lumiere.training.run import job, restarted_run

TIMED_OUT = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation")
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:30612")


class Clock:
    """In place of `time`; as it is slept on, `during` is called with the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.during: Callable[[float], None] = lambda now: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(distributed, "time", clock)
    return clock


@pytest.fixture
def ranks() -> list[TorchrunGroup]:
    """Four processes that share a store."""
    store = HashStore()
    return [TorchrunGroup(ProcessGroup(rank, 4), store) for rank in range(4)]


def test_a_rank_that_sends_heartbeats_is_waited_for(clock: Clock, ranks: list[TorchrunGroup]) -> None:
    def prepare(now: float) -> None:
        if now < 10 * HEARTBEAT_TIMEOUT:
            ranks[0].beat()
        else:
            ranks[0].send_choice("train")

    clock.during = prepare
    assert ranks[1].receive_choice() == "train"
    assert clock.now >= 10 * HEARTBEAT_TIMEOUT


@pytest.mark.parametrize("last_beat", [0.0, 300.0])
def test_a_rank_that_falls_silent_is_named(clock: Clock, ranks: list[TorchrunGroup], last_beat: float) -> None:
    clock.during = lambda now: ranks[0].beat() if now <= last_beat else None
    with pytest.raises(RankTimeoutError, match="rank 0 of 4"):
        ranks[1].receive_choice()
    assert clock.now == pytest.approx(last_beat + HEARTBEAT_TIMEOUT, abs=1)


def test_only_the_ranks_that_have_not_prepared_are_named(clock: Clock, ranks: list[TorchrunGroup]) -> None:
    ranks[1].send_choice("")  # done, and silent since
    with pytest.raises(RankTimeoutError, match="ranks 1, 2 and 3 of 4"):
        ranks[0].connect(600)


def test_heartbeats_are_sent_beside_other_work(ranks: list[TorchrunGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    sent = threading.Semaphore(0)
    monkeypatch.setattr(distributed, "HEARTBEAT_SECONDS", 0.001)
    monkeypatch.setattr(TorchrunGroup, "beat", lambda processes: sent.release())
    ranks[0].send_heartbeats()
    assert [sent.acquire(timeout=60) for _ in range(3)] == [True] * 3
    ranks[0]._connected.set()


@pytest.mark.parametrize(("hung", "speaker"), [([0], 1), ([2], 1), ([1, 3], 2)])
def test_the_first_rank_that_timed_out_names_those_that_hang(
    ranks: list[TorchrunGroup], monkeypatch: pytest.MonkeyPatch, hung: list[int], speaker: int
) -> None:
    """Those that time out close the connections to the others, which fail in another way."""
    monkeypatch.setattr(distributed, "ROLL_CALL_SECONDS", 0.2)
    arrived = [processes for processes in ranks if processes.rank not in hung]
    for processes in arrived:
        processes.rank_timeout = 600
    answered = threading.Barrier(len(arrived))

    def wait(processes: TorchrunGroup) -> BaseException:
        answered.wait(60)
        with pytest.raises(LostProcessError) as raised, noticing_losses(processes):
            raise TIMED_OUT if processes.rank >= speaker else CLOSED
        return raised.value

    with ThreadPoolExecutor(4) as pool:
        errors = dict(zip([processes.rank for processes in arrived], pool.map(wait, arrived), strict=True))
    assert [rank for rank, error in errors.items() if isinstance(error, RankTimeoutError)] == [speaker]
    assert [int(digit) for digit in re.findall(r"\d", str(errors[speaker]).partition(" of 4")[0])] == hung


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProcessGroup]:
    """A process that torchrun started alone: by its store, the number of the start, and its purpose."""

    def launch(store: HashStore, start: int = 0, purpose: str = "train") -> ProcessGroup:
        monkeypatch.setattr(
            import_module("torch.distributed.rendezvous"), "rendezvous", lambda *args, **kwargs: iter([(store, 0, 1)])
        )
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))
        with joined(purpose) as processes:
            return processes

    return launch


def test_a_restart_finds_the_run_of_its_own_launch_and_purpose(launched: Callable[..., ProcessGroup]) -> None:
    """Whatever the id of torchrun: it is the same in all of these launches."""
    runs, launch = RunStore(), HashStore()
    mine, half_made, damaged = runs.create(), runs.create(), runs.create()
    processes = launched(launch)
    assert restarted_run(runs, processes) is None
    for run in (mine, half_made):
        run.update(job=job(processes))
    damaged.update(job="night")
    for run in (mine, damaged):
        run.config_path.write_text("{}")
    assert restarted_run(runs, launched(launch, start=1)) == mine
    assert restarted_run(runs, launched(launch, start=2)) == mine
    assert restarted_run(runs, launched(launch, start=1, purpose="another config")) is None
    assert restarted_run(runs, launched(HashStore(), start=1)) is None


def test_without_torchrun_there_is_no_job_and_nobody_to_join() -> None:
    with joined() as processes:
        assert processes == SINGLE_PROCESS
    assert job(ProcessGroup()) is None
    assert restarted_run(RunStore(), ProcessGroup()) is None
