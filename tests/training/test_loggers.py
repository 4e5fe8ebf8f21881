"""A logger may fail wherever it likes: training goes on, and is told once."""

from pathlib import Path

import pytest

from lumiere.training import loggers
from lumiere.training.events import CheckpointEvent, Event, StepEvent, WarningEvent
from lumiere.training.loggers import opened_loggers


class Faulty:
    """A logger that fails at an event of a kind, or when it is closed."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.seen: list[str] = []

    def __call__(self, event: Event) -> None:
        self.note(type(event).__name__)

    def close(self, failed: bool) -> None:
        self.note("close")

    def note(self, what: str) -> None:
        self.seen.append(what)
        if what == self.fault:
            raise OSError(28, "No space left\non device")


@pytest.mark.parametrize(
    ("fault", "step", "seen"),
    [
        ("StartEvent", 0, ["StartEvent"]),
        ("StepEvent", 1, ["StartEvent", "CheckpointEvent", "StepEvent"]),
        ("close", 6, None),
    ],
)
def test_a_logger_that_fails_is_left_out(
    configure, launch, tensor_hashes, monkeypatch: pytest.MonkeyPatch, fault: str, step: int, seen: list[str] | None
) -> None:
    events: list[Event] = []
    log = Faulty(fault)
    monkeypatch.setattr(loggers, "distribution", lambda name: None)
    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda config, run, emit: log)
    result = launch(configure({"training.loggers": ["wandb"]}), [events.append])
    warnings = [event for event in events if isinstance(event, WarningEvent)]
    reason = "[Errno 28] No space left on device"
    assert warnings == [WarningEvent(step, f"training without wandb, which failed: {reason}")]
    assert result.run.record.status == "finished"
    if seen is None:
        assert log.seen.count("StepEvent") == 6
    else:
        assert [what for what in log.seen if what != "CheckpointEvent"] == [w for w in seen if w != "CheckpointEvent"]
    assert tensor_hashes(result.run, "latest") == tensor_hashes(launch(configure({})).run, "latest")


def test_loggers_are_closed_and_told_how_it_ended(configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed: list[bool] = []

    class Log:
        def __call__(self, event: Event) -> None: ...

        def close(self, failed: bool) -> None:
            closed.append(failed)

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda config, run, emit: Log())
    config = configure({"training.loggers": ["tensorboard"]})
    with opened_loggers(config, None, []) as callbacks:  # pyright: ignore
        assert len(callbacks) == 1
    with pytest.raises(KeyboardInterrupt), opened_loggers(config, None, []):  # pyright: ignore
        raise KeyboardInterrupt
    assert closed == [False, True]


def test_every_listener_hears_every_event_before_the_loggers(configure) -> None:
    heard: list[Event] = []
    with opened_loggers(configure({}), None, [heard.append]) as callbacks:  # pyright: ignore
        assert callbacks == [heard.append]
    event = StepEvent(1, 0.1, 32, 0.1, 2.0, 1e-3, 1.0, 320.0, 0.4)
    callbacks[0](event)
    assert heard == [event]
    assert CheckpointEvent(1, "best") not in heard
