"""Real signals to this process."""

import signal
import threading
from collections.abc import Iterator

import pytest

from lumiere.training.trainer import GracefulStop

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def received() -> Iterator[list[int]]:
    """SIGINT raises KeyboardInterrupt, as in a fresh Python; SIGTERM, which would end the tests, is only recorded."""
    seen: list[int] = []
    before = handlers()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def handlers() -> list[signal.Handlers | int | None]:
    return [signal.getsignal(number) for number in SIGNALS]  # pyright: ignore


@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_signal_is_recorded_and_the_second_acts(first: signal.Signals, received: list[int]) -> None:
    before = handlers()
    with GracefulStop() as stop:
        assert stop.signal_number is None
        assert not set(handlers()) & set(before)
        signal.raise_signal(first)
        assert (stop.signal_number, received) == (first, [])
        assert handlers() == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert (stop.signal_number, received) == (first, [signal.SIGTERM])
    assert handlers() == before


def test_handlers_are_restored_without_a_signal_and_after_an_error() -> None:
    before = handlers()
    with GracefulStop():
        pass
    assert handlers() == before
    with pytest.raises(ValueError, match="boom"), GracefulStop():
        raise ValueError("boom")
    assert handlers() == before


def test_in_another_thread_nothing_happens() -> None:
    before, inside = handlers(), []

    def enter() -> None:
        with GracefulStop() as stop:
            inside.extend([*handlers(), stop.signal_number])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [*before, None]
    assert handlers() == before
