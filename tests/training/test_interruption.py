"""Real signals to this process."""

import signal
import threading
from collections.abc import Iterator

import pytest

from lumiere.training.trainer import GracefulStop

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def received() -> Iterator[list[int]]:
    """SIGINT raises KeyboardInterrupt, as in a fresh Python; SIGTERM, which would end the tests, is only noted."""
    noted: list[int] = []
    before = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    yield noted
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_only_noted(number: signal.Signals, received: list[int]) -> None:
    with GracefulStop() as interruption:
        assert interruption.signal_number is None
        signal.raise_signal(number)
        assert interruption.signal_number == number
    assert received == []


@pytest.mark.parametrize("first", SIGNALS)
def test_the_second_one_acts_as_ever(first: signal.Signals, received: list[int]) -> None:
    with GracefulStop() as interruption:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert interruption.signal_number == first


@pytest.mark.parametrize("signalled", [False, True])
def test_handlers_are_restored(signalled: bool) -> None:
    before = handlers()
    with GracefulStop():
        assert not set(handlers()) & set(before)
        if signalled:
            signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_handlers_are_restored_after_an_error() -> None:
    before = handlers()
    with pytest.raises(ValueError, match="boom"), GracefulStop():
        raise ValueError("boom")
    assert handlers() == before


def test_in_another_thread_nothing_happens() -> None:
    before, inside, noted = handlers(), [], []

    def enter() -> None:
        with GracefulStop() as interruption:
            inside.extend(handlers())
            noted.append(interruption.signal_number)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == before == handlers()
    assert noted == [None]
