"""The lines of `metrics.jsonl`: their keys are an interface, which scripts of users read."""

import json
import math
from pathlib import Path

import pytest

from lumiere.evaluation.loss import Evaluation
from lumiere.persistence.metrics import MetricsWriter
from lumiere.persistence.runs import Run
from lumiere.training.events import CheckpointEvent, EvaluationEvent, Event, StartEvent, StepEvent, WarningEvent
from lumiere.training.loggers import MetricsLog

PROGRESS = ["step", "epoch", "tokens", "time"]
TRAINING = [*PROGRESS, "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu"]
EVALUATION = [*PROGRESS, "val_loss", "val_perplexity", "val_bits_per_byte"]
SCORES = Evaluation(4.5, 90.0, 4.4, 95.0, 1.8, 700.0, 1000, 80, 3, 32, 0.5)


@pytest.fixture
def lines(tmp_path: Path):
    """What a list of events writes."""

    def written(*events: Event) -> list[str]:
        with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
            log = MetricsLog(writer)
            for event in events:
                log(event)
        return (tmp_path / "metrics.jsonl").read_text().splitlines()

    return written


def test_a_training_line(lines) -> None:
    event = StepEvent(
        step=20,
        epoch=1 / 3,
        tokens=640,
        seconds=1.23456,
        loss=5.4321098765,
        learning_rate=0.00012345678,
        grad_norm=0.98765432,
        tokens_per_second=518.3987,
        mfu=0.412345,
    )
    assert lines(event) == [
        '{"step": 20, "epoch": 0.333333, "tokens": 640, "time": 1.235, "loss": 5.4321098765, '
        '"learning_rate": 0.00012345678, "grad_norm": 0.98765432, "tokens_per_second": 518.4, "mfu": 0.4123}'
    ]


def test_an_evaluation_line(lines) -> None:
    event = EvaluationEvent(step=20, epoch=0.5, tokens=640, seconds=1.5, evaluation=SCORES, is_best=True)
    assert lines(event) == [
        '{"step": 20, "epoch": 0.5, "tokens": 640, "time": 1.5, '
        '"val_loss": 4.5, "val_perplexity": 90.0, "val_bits_per_byte": 1.8}'
    ]


def test_a_number_that_is_none_becomes_null(lines) -> None:
    (line,) = lines(StepEvent(1, 0.1, 32, 0.1, math.nan, 1e-3, math.inf, 320.0, 0.4))
    assert json.loads(line)["loss"] is None
    assert json.loads(line)["grad_norm"] is None


def test_other_events_write_nothing(lines) -> None:
    start = StartEvent("run_a", 0, 10, 5, 1000, 50, "cpu", "float32", 1e11)
    assert lines(start, CheckpointEvent(1, "best"), WarningEvent(1, "slow")) == []


def test_the_lines_of_a_run(trained_run: Run) -> None:
    lines = [json.loads(line) for line in trained_run.metrics_path.read_text().splitlines()]
    assert [(line["step"], list(line)) for line in lines] == [
        (2, TRAINING),
        (4, TRAINING),
        (4, EVALUATION),
        (6, TRAINING),
        (8, TRAINING),
        (8, EVALUATION),
        (10, TRAINING),
        (12, TRAINING),
        (12, EVALUATION),
    ]
    for line in lines:
        if "val_loss" in line:
            assert line["val_perplexity"] == pytest.approx(math.exp(line["val_loss"]))
