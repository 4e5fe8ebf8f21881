"""How processes wait for each other by the store of torchrun: here one in memory, and a clock that no one waits for."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
from torch.distributed import HashStore

from lumiere.components.world import World
from lumiere.errors import LostProcessError, RankTimeoutError
from lumiere.persistence.runs import RunStore
from lumiere.training import processes
from lumiere.training.processes import HEARTBEAT_TIMEOUT, JoinedWorld, joined, noticing_losses
from lumiere.training.restarts import job, restarted_run

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
    monkeypatch.setattr(processes, "time", clock)
    return clock


@pytest.fixture
def worlds() -> list[JoinedWorld]:
    """Four processes that share a store."""
    store = HashStore()
    return [JoinedWorld(World(rank, 4), store) for rank in range(4)]


def test_a_rank_that_sends_heartbeats_is_waited_for(clock: Clock, worlds: list[JoinedWorld]) -> None:
    def prepare(now: float) -> None:
        if now < 10 * HEARTBEAT_TIMEOUT:
            worlds[0].beat()
        else:
            worlds[0].send_task("train")

    clock.during = prepare
    assert worlds[1].receive_task() == "train"
    assert clock.now >= 10 * HEARTBEAT_TIMEOUT


@pytest.mark.parametrize("last_beat", [0.0, 300.0])
def test_a_rank_that_falls_silent_is_named(clock: Clock, worlds: list[JoinedWorld], last_beat: float) -> None:
    clock.during = lambda now: worlds[0].beat() if now <= last_beat else None
    with pytest.raises(RankTimeoutError, match="rank 0 of 4"):
        worlds[1].receive_task()
    assert clock.now == pytest.approx(last_beat + HEARTBEAT_TIMEOUT, abs=1)


def test_only_the_ranks_that_have_not_prepared_are_named(clock: Clock, worlds: list[JoinedWorld]) -> None:
    worlds[1].send_task("")  # done, and silent since
    with pytest.raises(RankTimeoutError, match="ranks 1, 2 and 3 of 4"):
        worlds[0].connect(600)


def test_heartbeats_are_sent_beside_other_work(worlds: list[JoinedWorld], monkeypatch: pytest.MonkeyPatch) -> None:
    sent = threading.Semaphore(0)
    monkeypatch.setattr(processes, "HEARTBEAT_SECONDS", 0.001)
    monkeypatch.setattr(JoinedWorld, "beat", lambda world: sent.release())
    worlds[0].send_heartbeats()
    assert [sent.acquire(timeout=60) for _ in range(3)] == [True] * 3
    worlds[0]._connected.set()


@pytest.mark.parametrize(("hung", "speaker"), [([0], 1), ([2], 1), ([1, 3], 2)])
def test_the_first_rank_that_timed_out_names_those_that_hang(
    worlds: list[JoinedWorld], monkeypatch: pytest.MonkeyPatch, hung: list[int], speaker: int
) -> None:
    """Those that time out close the connections to the others, which fail in another way."""
    monkeypatch.setattr(processes, "ROLL_CALL_SECONDS", 0.2)
    arrived = [world for world in worlds if world.rank not in hung]
    for world in arrived:
        world.rank_timeout = 600
    answered = threading.Barrier(len(arrived))

    def wait(world: JoinedWorld) -> BaseException:
        answered.wait(60)
        with pytest.raises(LostProcessError) as raised, noticing_losses(world):
            raise TIMED_OUT if world.rank >= speaker else CLOSED
        return raised.value

    with ThreadPoolExecutor(4) as pool:
        errors = dict(zip([world.rank for world in arrived], pool.map(wait, arrived), strict=True))
    assert [rank for rank, error in errors.items() if isinstance(error, RankTimeoutError)] == [speaker]
    assert [int(digit) for digit in re.findall(r"\d", str(errors[speaker]).partition(" of 4")[0])] == hung


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """The world of a process that torchrun started, alone: by its store, the number of the start, and its purpose."""

    def launch(store: HashStore, start: int = 0, purpose: str = "train") -> World:
        monkeypatch.setattr(
            import_module("torch.distributed.rendezvous"), "rendezvous", lambda *args, **kwargs: iter([(store, 0, 1)])
        )
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))
        with joined(purpose) as world:
            return world

    return launch


def test_a_restart_finds_the_run_of_its_own_launch_and_purpose(launched: Callable[..., World]) -> None:
    """Whatever the id of torchrun: it is the same in all of these launches."""
    runs, launch = RunStore(), HashStore()
    mine, half_made, damaged = runs.create(), runs.create(), runs.create()
    world = launched(launch)
    assert restarted_run(runs, world) is None
    for run in (mine, half_made):
        run.update(job=job(world))
    damaged.update(job="night")
    for run in (mine, damaged):
        run.config_path.write_text("{}")
    assert restarted_run(runs, launched(launch, start=1)) == mine
    assert restarted_run(runs, launched(launch, start=2)) == mine
    assert restarted_run(runs, launched(launch, start=1, purpose="another config")) is None
    assert restarted_run(runs, launched(HashStore(), start=1)) is None


def test_without_torchrun_there_is_no_job() -> None:
    assert job(World()) is None
    assert restarted_run(RunStore(), World()) is None
