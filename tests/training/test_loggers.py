"""`metrics.jsonl`, whose keys users' scripts read; and a logger may fail anywhere: training continues without it."""

import json
import math
from pathlib import Path

import pytest

from lumiere.evaluation.loss import Evaluation
from lumiere.persistence.metrics import MetricsWriter
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import loggers
from lumiere.training.events import CheckpointEvent, EvaluationEvent, StartEvent, StepEvent, WarningEvent
from lumiere.training.loggers import metrics_log, opened_loggers
from tests.training.short import hashes, short, train

PROGRESS = ["step", "epoch", "tokens", "time"]
TRAINING = [*PROGRESS, "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu"]
EVALUATION = [*PROGRESS, "val_loss", "val_perplexity", "val_bits_per_byte"]


def test_lines_of_events(tmp_path: Path) -> None:
    evaluation = Evaluation(4.5, 90.0, 4.4, 95.0, 1.8, 700.0, 1000, 80, 3, 32, 0.5)
    events = [
        StartEvent("run_a", 0, 10, 5, 1000, 50, "cpu", "float32", 1e11),
        StepEvent(20, 1 / 3, 640, 1.23456, 5.4321098765, 0.00012345678, 0.98765432, 518.3987, 0.412345),
        EvaluationEvent(20, 0.5, 640, 1.5, evaluation, True),
        StepEvent(21, 0.5, 640, 1.5, math.nan, 1e-3, math.inf, 320.0, 0.4),
        CheckpointEvent(1, "best"),
        WarningEvent(1, "slow"),
    ]
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for event in events:
            metrics_log(writer)(event)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 20, "epoch": 0.333333, "tokens": 640, "time": 1.235, "loss": 5.4321098765, '
        '"learning_rate": 0.00012345678, "grad_norm": 0.98765432, "tokens_per_second": 518.4, "mfu": 0.4123}',
        '{"step": 20, "epoch": 0.5, "tokens": 640, "time": 1.5, '
        '"val_loss": 4.5, "val_perplexity": 90.0, "val_bits_per_byte": 1.8}',
        '{"step": 21, "epoch": 0.5, "tokens": 640, "time": 1.5, "loss": null, '
        '"learning_rate": 0.001, "grad_norm": null, "tokens_per_second": 320.0, "mfu": 0.4}',
    ]


def test_lines_of_a_run(trained_run: Run) -> None:
    lines = [json.loads(line) for line in trained_run.metrics_path.read_text().splitlines()]
    expected = [(step, TRAINING) for step in (2, 4, 6, 8, 10, 12)] + [(step, EVALUATION) for step in (4, 8, 12)]
    assert [(line["step"], list(line)) for line in lines] == sorted(expected, key=lambda pair: pair[0])
    for line in lines:
        if "val_loss" in line:
            assert line["val_perplexity"] == pytest.approx(math.exp(line["val_loss"]))


class Faulty:
    """A logger that fails when it is opened, at its first metrics, or when it is closed."""

    def __init__(self, fault: str, calls: list[str]) -> None:
        self.fault = fault
        self.calls = calls
        self.note("open")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.note("log")

    def close(self, failed: bool) -> None:
        self.note("close")

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fault:
            raise OSError(28, "No space left\non device")


@pytest.mark.parametrize(
    ("fault", "step", "calls"),
    [("open", 0, ["open"]), ("log", 1, ["open", "log"]), ("close", 6, ["open", *["log"] * 8, "close"])],
)
def test_a_failing_logger_is_dropped_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, fault: str, step: int, calls: list[str]
) -> None:
    found: list[str] = []
    monkeypatch.setattr(loggers, "distribution", lambda name: None)
    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda *given: Faulty(fault, found))
    trained = train(short(loggers=["wandb"]))
    warnings = [event for event in trained.events if isinstance(event, WarningEvent)]
    reason = "[Errno 28] No space left on device"
    assert warnings == [WarningEvent(step, f"training without wandb, which failed: {reason}")]
    assert trained.run.record.status == "finished"
    assert found == calls
    assert hashes(trained.run) == hashes(train(short()).run)


def test_loggers_come_last_and_are_closed_with_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    run, start = RunStore().create(), StartEvent("run_a", 0, 10, 5, 1000, 50, "cpu", "float32", 1e11)
    closed: list[bool] = []
    order: list[str] = []

    class Log(Faulty):
        def close(self, failed: bool) -> None:
            closed.append(failed)

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda *given: Log("", order))
    config = short(loggers=["tensorboard"])

    def train_until(error: BaseException | None) -> None:
        with opened_loggers(config, run, [lambda event: order.append("callback")]) as emit:
            emit(start)
            if error:
                raise error

    train_until(None)
    with pytest.raises(KeyboardInterrupt):
        train_until(KeyboardInterrupt())
    assert closed == [False, True]
    assert order == ["callback", "open"] * 2
