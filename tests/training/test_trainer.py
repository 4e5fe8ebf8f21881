"""The training loop: what it computes, what it counts, when it stops and which events it emits."""

import json
import math
import signal
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lumiere.data.batches import IGNORED, Batch, batch_at, make_batch
from lumiere.data.dataset import tokenize_corpus
from lumiere.evaluation.loss import Evaluation
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.training import schedule, trainer
from lumiere.training.events import CheckpointEvent, Event, StartEvent
from lumiere.training.loss import summed_loss
from lumiere.training.state import TrainingState
from lumiere.training.trainer import train_step
from tests.training.conftest import TrainedOnce
from tests.training.short import (
    BATCH_SIZE,
    CPU,
    EPOCH_STEPS,
    hashes,
    names,
    only_run,
    saved_step,
    short,
    stop_at,
    take_step,
    train,
    windows_of,
)


def count_targets(batch: Batch) -> int:
    return int((batch.targets != IGNORED).sum())


# What it computes


def test_losses_are_those_of_the_golden_file(golden) -> None:
    """A change of the model, the data, their order or the optimizer shows here, and is then written down on purpose."""
    changes = {"model.num_layers": 2, "dataset.num_documents": 10}
    trained = train(short(changes, max_steps=100, eval_interval=25, batch_size=8))
    computed = {
        "loss": [round(event.loss, 6) for event in trained.steps],
        "val_loss": [round(event.evaluation.loss, 6) for event in trained.evaluations],
    }
    expected = json.loads(golden("tiny_losses.json", json.dumps(computed, indent=1) + "\n"))
    assert len(expected["loss"]) == 100
    assert computed == {name: pytest.approx(losses, abs=1e-3) for name, losses in expected.items()}
    assert computed["loss"][0] == pytest.approx(math.log(320), abs=0.05), "all tokens are equally probable at first"
    assert computed["loss"][-1] < computed["loss"][0] - 1
    assert computed["val_loss"][-1] < math.log(320) - 1


@pytest.mark.slow
def test_it_learns_more_than_token_frequencies() -> None:
    changes = {"dataset.num_documents": 100, "model.dropout": 0.0}
    config = short(changes, batch_size=32, max_steps=600)
    corpus = tokenize_corpus(config)
    counts = Counter(corpus.splits["train"].ids.tolist())
    total = counts.total() + config.tokenizer.vocab_size
    targets = corpus.splits["validation"].ids.tolist()
    unigram = -sum(math.log((counts[token] + 1) / total) for token in targets) / len(targets)
    assert train(config).evaluations[-1].evaluation.loss < unigram - 1


@pytest.fixture
def padded_batch() -> Batch:
    """Eight windows of which each half, and each quarter, has another number of targets."""
    windows = windows_of(short({"dataset.num_documents": 10}))
    _, lengths = windows.cut(np.arange(len(windows)))
    by_length = np.argsort(lengths, kind="stable")
    return make_batch(windows, np.concatenate([by_length[:3], by_length[-5:]]))


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_each_target_weighs_the_same_in_any_part(padded_batch: Batch, parts: int) -> None:
    """Loss and gradients are those of torch's own mean over the targets of the whole batch."""
    config = short({"model.dropout": 0.0}, gradient_clip_norm=None, gradient_accumulation_steps=parts)
    sizes = {count_targets(part) for part in padded_batch.split(parts)}
    assert len(sizes) > 1 or parts == 1
    expected = TrainingState.create(config, CPU).model
    logits = expected.logits(padded_batch.tokens).flatten(0, 1)
    mean = torch.nn.functional.cross_entropy(logits, padded_batch.targets.flatten(), ignore_index=IGNORED)
    gradients = torch.autograd.grad(mean, list(expected.parameters()))
    state = TrainingState.create(config, CPU)
    state.optimizers.step = lambda factor: None
    loss, norm = take_step(state, padded_batch, config)
    assert loss == pytest.approx(mean.item(), rel=1e-6)
    assert norm == pytest.approx(torch.cat([gradient.flatten() for gradient in gradients]).norm().item(), rel=1e-5)
    for parameter, gradient in zip(state.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_no_part_of_a_batch_waits_for_the_device() -> None:
    tokens = torch.zeros(6, 4, dtype=torch.long)
    reads = []
    for parts in (1, 3):
        config = short(gradient_accumulation_steps=parts)
        state = TrainingState.create(config, CPU)

        def reads_nothing(model: Any, *_: torch.Tensor) -> torch.Tensor:
            return model.token_embedding.weight.sum()

        with torch.profiler.profile() as profile:
            train_step(state, Batch(tokens, tokens, 24), 1.0, config.training, torch.float32, reads_nothing)
        reads.append(sum(event.count for event in profile.key_averages() if event.key == "aten::item"))
    assert reads[0] == reads[1]


def test_gradients_are_clipped_after_their_norm_is_taken(padded_batch: Batch) -> None:
    used: list[float] = []

    def step(limit: float | None) -> float:
        config = short(gradient_clip_norm=limit)
        state = TrainingState.create(config, CPU)

        def record(factor: float) -> None:
            gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
            used.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

        state.optimizers.step = record
        return take_step(state, padded_batch, config)[1]

    norm = step(None)
    assert norm > 0.1
    assert [step(0.01), step(1000.0)] == pytest.approx([norm, norm])
    assert used == pytest.approx([norm, 0.01, norm], rel=1e-3)


# What it counts


def test_tokens_are_targets_without_padding() -> None:
    config = short({"dataset.sliding_window_size": 4}, max_steps=2 * EPOCH_STEPS)
    trained = train(config)
    split, windows = tokenize_corpus(config).splits["train"], windows_of(config)
    expected = 0
    for first, last in zip(split.offsets, split.offsets[1:], strict=False):
        start = int(first)
        while start + 17 < last:
            expected += 16
            start += 17 - 4
        expected += int(last) - start - 1
    assert expected < 16 * len(windows), "there is padding, which does not count"
    steps = trained.steps
    assert [steps[EPOCH_STEPS - 1].tokens, steps[-1].tokens] == [expected, 2 * expected]
    assert steps[2].tokens == sum(batch_at(step, windows, BATCH_SIZE, 0).num_targets for step in range(3))
    assert [event.epoch for event in steps] == pytest.approx([step / EPOCH_STEPS for step in range(1, 11)])
    started = trained.events[0]
    assert isinstance(started, StartEvent)
    assert (started.steps_per_epoch, started.total_steps) == (EPOCH_STEPS, 10)


def test_time_and_speed_are_those_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at this clock, and so each step, takes half a second; an evaluation takes a thousand."""
    now = 0.0

    def perf_counter() -> float:
        nonlocal now
        now += 0.5
        return now

    def slow_evaluate(*arguments: Any) -> Evaluation:
        nonlocal now
        now += 1000
        return evaluate(*arguments)

    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=perf_counter))
    monkeypatch.setattr(trainer, "evaluate", slow_evaluate)
    trained = train(short(max_steps=7, log_interval=3))
    steps = trained.steps
    assert [event.step for event in steps] == [3, 6, 7], "the last step is always reported"
    assert [event.seconds for event in steps] == [1.5, 3.0, 3.5]
    tokens = np.diff([0, *(event.tokens for event in steps)])
    assert [event.tokens_per_second for event in steps] == pytest.approx(tokens / [1.5, 1.5, 0.5])
    assert trained.state.seconds == 3.5


def test_the_schedule_spans_the_whole_training() -> None:
    trained = train(short(schedule="linear", warmup_steps=0, max_steps=None, max_epochs=2))
    expected = [1e-2 * (1 - step / 11) for step in range(1, 11)]
    assert [event.learning_rate for event in trained.steps] == pytest.approx(expected)


# When it stops


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "eval_interval", "evaluated"),
    [
        (3, 1, None, [3]),
        (7, 1, 3, [3, 5, 6, 7]),
        (10, 9, 5, [5, 10]),
        (None, 2, 3, [3, 5, 6, 9, 10]),
    ],
)
def test_length_and_evaluations(
    max_steps: int | None, max_epochs: int, eval_interval: int | None, evaluated: list[int]
) -> None:
    """`max_steps` replaces `max_epochs`; evaluations come after each epoch, at each interval and at the end."""
    config = short(max_steps=max_steps, max_epochs=max_epochs, eval_interval=eval_interval, patience=None)
    trained = train(config)
    assert trained.end == (evaluated[-1], "max_steps" if max_steps else "max_epochs")
    assert trained.result.signal_number is None
    assert [event.step for event in trained.evaluations] == evaluated
    assert trained.result.evaluation == trained.evaluations[-1].evaluation
    assert set(names(trained.run)) >= {"best", "latest"}
    assert schedule.num_steps(config.training, EPOCH_STEPS) == evaluated[-1]
    assert schedule.num_evaluations(config.training, EPOCH_STEPS) == len(evaluated)
    assert schedule.earliest_stop(config.training, EPOCH_STEPS) is None


@pytest.mark.parametrize(("patience", "earliest"), [(2, 15), (3, None)])
def test_without_improvement_patience_ends_it_at_the_earliest(patience: int, earliest: int | None) -> None:
    config = short(max_steps=None, max_epochs=4, patience=patience, stopping_threshold=100.0)
    trained = train(config)
    assert trained.end == ((earliest, "patience") if earliest else (20, "max_epochs"))
    assert schedule.earliest_stop(config.training, EPOCH_STEPS) == earliest
    assert trained.state.epochs_without_improvement == trained.state.step // EPOCH_STEPS - 1


def test_patience_counts_the_ends_of_epochs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # At the ends of epochs: the first, too little better, better, and twice too little. Those between would change it.
    losses = {3: 9.0, 5: 5.0, 6: 1.0, 9: 9.0, 10: 4.95, 12: 9.0}
    losses |= {15: 4.7, 18: 9.0, 20: 4.65, 21: 9.0, 24: 9.0, 25: 4.61}
    evaluate = trainer.evaluate
    remaining = iter([*losses.values(), *losses.values()])
    monkeypatch.setattr(trainer, "evaluate", lambda *given: replace(evaluate(*given), loss=next(remaining)))
    config = short(patience=2, stopping_threshold=0.1, max_steps=None, max_epochs=9, eval_interval=3)
    trained = train(config)
    assert trained.end == (25, "patience")
    assert [event.step for event in trained.evaluations] == list(losses)
    # `best` goes by the loss of any evaluation, and keeps the state of that step.
    assert [event.step for event in trained.evaluations if event.is_best] == [3, 5, 6]
    assert (trained.state.best_loss, trained.state.best_step) == (1.0, 6)
    best = CheckpointManager().load(trained.run, "best")
    assert (best.metadata["step"], best.metadata["best_loss"]) == (6, 1.0)
    remaining = iter(losses.values())
    stopped_there = train(config, stop_at(6))
    assert hashes(trained.run, "best") == hashes(stopped_there.run) != hashes(trained.run)


def test_a_signal_finishes_the_step_saves_and_stops() -> None:
    stopped = train(short(), stop_at(4))
    assert (stopped.end, stopped.result.signal_number) == ((4, None), signal.SIGINT)
    assert stopped.events[-1] == CheckpointEvent(4, "latest")
    # At the last step there is nothing left to interrupt.
    ended = train(short(), stop_at(6))
    assert (ended.end, ended.result.signal_number) == ((6, "max_steps"), None)


# Which events it emits


def test_events_in_order_and_checkpoints_that_exist_when_they_are_announced() -> None:
    def check(event: Event) -> None:
        if isinstance(event, CheckpointEvent):
            run = only_run()
            assert saved_step(run, event.name) == run.record.step == event.step

    trained = train(short(max_steps=6, log_interval=2, eval_interval=4, checkpoint_interval=3), check)
    emitted = [(getattr(event, "name", type(event).__name__), event.step) for event in trained.events]
    assert emitted == [
        ("StartEvent", 0),
        ("StepEvent", 2),
        ("latest", 3),
        ("StepEvent", 4),
        ("EvaluationEvent", 4),
        ("best", 4),
        ("latest", 4),
        ("EvaluationEvent", 5),  # the end of an epoch
        ("best", 5),
        ("latest", 5),
        ("StepEvent", 6),
        ("EvaluationEvent", 6),
        ("best", 6),
        ("latest", 6),
    ]


def test_if_compiling_fails_it_warns_once_and_trains_without(
    monkeypatch: pytest.MonkeyPatch, trained_once: TrainedOnce
) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    trained = train(short(compile=True))
    (warning,) = trained.warnings
    assert warning.endswith("no C++ compiler found")
    assert hashes(trained.run) == hashes(trained_once(short()))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_our_kernels_end_where_plain_torch_operations_do(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    # At ten times this learning rate training is chaotic: the last bit of a product decides about tenths of a nat.
    changes = {"model.dropout": 0.0, "dataset.num_documents": 40}

    def plain_loss(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model.logits(tokens).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def loss(precision: str) -> float:
        config = short(changes, max_steps=300, learning_rate=1e-3, precision=precision)
        return train(config).evaluations[-1].evaluation.loss

    fast = loss(precision)
    with monkeypatch.context() as patch:
        patch.setattr("lumiere.components.kernels.prefers_hand_written", lambda x: False)
        patch.setattr(trainer, "summed_loss", plain_loss)
        plain = loss("float32")
    assert trainer.summed_loss is summed_loss
    assert plain < 4.5, "it has learned something: 5.77 would be a guess"
    assert fast == pytest.approx(plain, abs=0.01)
