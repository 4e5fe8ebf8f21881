"""The training loop: what it computes, what it counts, when it stops and what it tells."""

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
from lumiere.persistence.runs import RunStore
from lumiere.training import trainer
from lumiere.training.events import CheckpointEvent, EvaluationEvent, Event, StartEvent, StepEvent, WarningEvent
from lumiere.training.loss import summed_loss
from lumiere.training.state import TrainingState
from lumiere.training.trainer import train_step

EPOCH_STEPS = 5
CPU = torch.device("cpu")


def steps(events: list[Event]) -> list[StepEvent]:
    return [event for event in events if isinstance(event, StepEvent)]


def evaluations(events: list[Event]) -> list[EvaluationEvent]:
    return [event for event in events if isinstance(event, EvaluationEvent)]


def count_targets(batch: Batch) -> int:
    return int((batch.targets != IGNORED).sum())


# What it computes


def test_the_same_seed_gives_the_same_bits(configure, launch, tensor_hashes) -> None:
    config = configure({})
    first: list[Event] = []
    second: list[Event] = []
    runs = [launch(config, [first.append]).run, launch(config, [second.append]).run]
    assert tensor_hashes(runs[0], "latest") == tensor_hashes(runs[1], "latest")
    assert [(event.loss, event.grad_norm) for event in steps(first)] == [
        (event.loss, event.grad_norm) for event in steps(second)
    ]


def test_losses_are_those_of_the_golden_file(configure, launch, golden) -> None:
    """A change of the model, the data, their order or the optimizer shows here, and is then written down on purpose."""
    events: list[Event] = []
    changes = {"max_steps": 100, "eval_interval": 25, "batch_size": 8}
    config = {"model.num_layers": 2, "dataset.num_documents": 10}
    launch(configure(config | {f"training.{name}": value for name, value in changes.items()}), [events.append])
    computed = {
        "loss": [round(event.loss, 6) for event in steps(events)],
        "val_loss": [round(event.evaluation.loss, 6) for event in evaluations(events)],
    }
    expected = json.loads(golden("tiny_losses.json", json.dumps(computed, indent=1) + "\n"))
    assert len(expected["loss"]) == 100
    assert computed == {name: pytest.approx(losses, abs=1e-3) for name, losses in expected.items()}


def test_the_loss_goes_down(configure, launch) -> None:
    events: list[Event] = []
    launch(configure({"training.max_steps": 40, "training.eval_interval": 20}), [events.append])
    losses = [event.loss for event in steps(events)]
    assert losses[0] == pytest.approx(math.log(320), abs=0.05), "at first every token is as likely as any other"
    assert losses[-1] < losses[0] - 1
    scores = [event.evaluation.loss for event in evaluations(events)]
    assert scores[-1] < scores[0] - 0.3


@pytest.mark.slow
def test_it_learns_more_than_how_frequent_each_token_is(configure, launch) -> None:
    config = configure(
        {
            "dataset.num_documents": 100,
            "training.batch_size": 32,
            "training.max_steps": 600,
            "training.snapshots": False,
            "model.dropout": 0.0,
        }
    )
    corpus = tokenize_corpus(config)
    counts = Counter(corpus.splits["train"].ids.tolist())
    total = counts.total() + config.tokenizer.vocab_size
    targets = corpus.splits["validation"].ids.tolist()
    unigram = -sum(math.log((counts[token] + 1) / total) for token in targets) / len(targets)
    result = launch(config)
    assert result.evaluation is not None
    assert result.evaluation.loss < unigram - 1


@pytest.fixture
def padded_batch(configure) -> Batch:
    """Eight windows of which each half, and each quarter, has another number of targets."""
    config = configure({"dataset.num_documents": 10})
    windows = tokenize_corpus(config).windows("train", config)
    _, lengths = windows.cut(np.arange(len(windows)))
    by_length = np.argsort(lengths, kind="stable")
    return make_batch(windows, np.concatenate([by_length[:3], by_length[-5:]]))


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_same_step(configure, padded_batch: Batch, parts: int) -> None:
    config = configure({"model.dropout": 0.0})

    def step(settings: Any, batch: Batch) -> tuple[float, float, torch.Tensor]:
        state = TrainingState.create(config, CPU)
        loss, norm = train_step(state, batch, 1.0, settings, torch.float32, summed_loss)
        return loss, norm, torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])

    split = config.training.model_copy(update={"gradient_accumulation_steps": parts})
    sizes = [count_targets(part) for part in padded_batch.split(parts)]
    assert len(set(sizes)) > 1
    assert sum(sizes) == padded_batch.num_targets < padded_batch.targets.numel()
    whole_loss, whole_norm, whole = step(config.training, padded_batch)
    loss, norm, weights = step(split, padded_batch)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert norm == pytest.approx(whole_norm, rel=1e-5)
    # Adam's first step is the sign of a gradient, and near zero that hangs on its last digits: a step is 1e-2 long.
    torch.testing.assert_close(weights, whole, rtol=0, atol=1e-5)
    # The padding matters: with one window's targets padding too, the step is another.
    targets = padded_batch.targets.clone()
    targets[-1] = IGNORED
    other = Batch(padded_batch.tokens, targets, int((targets != IGNORED).sum()))
    assert not torch.allclose(step(split, other)[2], whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_target_weighs_the_same_in_whatever_part_it_is(configure, padded_batch: Batch, parts: int) -> None:
    """Loss and gradients are those of torch's own mean over the targets of the whole batch."""
    config = configure({"model.dropout": 0.0, "training.gradient_clip_norm": None})
    expected = TrainingState.create(config, CPU).model
    logits = expected.logits(padded_batch.tokens).flatten(0, 1)
    mean = torch.nn.functional.cross_entropy(logits, padded_batch.targets.flatten(), ignore_index=IGNORED)
    mean.backward()
    state = TrainingState.create(config, CPU)
    state.optimizers.step = lambda factor: None
    settings = config.training.model_copy(update={"gradient_accumulation_steps": parts})
    loss, _ = train_step(state, padded_batch, 1.0, settings, torch.float32, summed_loss)
    assert loss == pytest.approx(mean.item(), rel=1e-6)
    for parameter, other in zip(state.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_no_part_of_a_batch_waits_for_the_device(configure) -> None:
    tokens = torch.zeros(6, 4, dtype=torch.long)
    reads = []
    for parts in (1, 3):
        config = configure({"training.gradient_accumulation_steps": parts})
        state = TrainingState.create(config, CPU)
        with torch.profiler.profile() as profile:
            train_step(
                state,
                Batch(tokens, tokens, 24),
                1.0,
                config.training,
                torch.float32,
                lambda model, *_: model.token_embedding.weight.sum(),  # an objective that reads nothing itself
            )
        reads.append(sum(event.count for event in profile.key_averages() if event.key == "aten::item"))
    assert reads[0] == reads[1]


def test_a_training_in_parts_gives_the_same_weights(configure, launch) -> None:
    """Over two epochs of windows that are padded differently, with a smaller batch at the end of each."""
    changes = {"model.dropout": 0.0, "model.context_size": 64, "dataset.num_documents": 10}
    changes |= {"training.max_epochs": 2, "training.max_steps": None}

    def train_in(parts: int) -> TrainingState:
        return launch(configure(changes | {"training.gradient_accumulation_steps": parts})).state

    def weights(state: TrainingState) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])

    config = configure(changes)
    windows = tokenize_corpus(config).windows("train", config)
    whole = train_in(1)
    assert whole.step * 12 > 2 * len(windows), "a batch is smaller"
    batches = [batch_at(step, windows, 12, 0) for step in range(whole.step)]
    uneven = [batch for batch in batches if len({count_targets(part) for part in batch.split(2)}) > 1]
    assert len(uneven) > len(batches) / 2
    assert (weights(whole) - weights(TrainingState.create(config, CPU))).abs().max() > 0.1
    for parts in (2, 4):
        torch.testing.assert_close(weights(train_in(parts)), weights(whole), rtol=0, atol=1e-5)


def test_gradients_are_clipped_after_their_norm_is_taken(configure, padded_batch: Batch) -> None:
    config = configure({})
    gradients: list[float] = []

    def step(limit: float | None) -> float:
        state = TrainingState.create(config, CPU)

        def note(factor: float) -> None:
            squares = [
                parameter.grad.square().sum() for parameter in state.model.parameters() if parameter.grad is not None
            ]
            gradients.append(torch.stack(squares).sum().sqrt().item())

        state.optimizers.step = note
        settings = config.training.model_copy(update={"gradient_clip_norm": limit})
        return train_step(state, padded_batch, 1.0, settings, torch.float32, summed_loss)[1]

    norm = step(None)
    assert norm > 0.1
    assert step(0.01) == pytest.approx(norm)
    assert step(1000.0) == pytest.approx(norm)
    assert gradients == pytest.approx([norm, 0.01, norm], rel=1e-3)


def test_evaluating_and_saving_change_nothing(configure, launch, tensor_hashes) -> None:
    busy = launch(configure({"training.eval_interval": 1, "training.checkpoint_interval": 1})).run
    rare = {"checkpoint_interval": None, "log_interval": 100, "snapshots": False}
    calm = launch(configure({f"training.{name}": value for name, value in rare.items()})).run
    assert tensor_hashes(busy, "latest") == tensor_hashes(calm, "latest")


# What it counts


def test_tokens_are_targets_without_padding(configure, launch) -> None:
    config = configure({"training.max_steps": 2 * EPOCH_STEPS, "dataset.sliding_window_size": 4})
    events: list[Event] = []
    launch(config, [events.append])
    split = tokenize_corpus(config).splits["train"]
    expected = 0
    for first, last in zip(split.offsets, split.offsets[1:], strict=False):
        start = int(first)
        while start + 17 < last:
            expected += 16
            start += 17 - 4
        expected += int(last) - start - 1
    windows = tokenize_corpus(config).windows("train", config)
    assert expected < 16 * len(windows), "there is padding, which does not count"
    told = steps(events)
    assert told[EPOCH_STEPS - 1].tokens == expected
    assert told[-1].tokens == 2 * expected
    assert [event.epoch for event in told] == pytest.approx([step / EPOCH_STEPS for step in range(1, 11)])
    start_event = events[0]
    assert isinstance(start_event, StartEvent)
    assert (start_event.steps_per_epoch, start_event.total_steps) == (EPOCH_STEPS, 10)
    assert told[2].tokens == sum(batch_at(step, windows, 12, 0).num_targets for step in range(3))


def test_time_and_speed_are_those_of_the_steps_alone(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at this clock takes half a second, and so a step does; an evaluation takes a thousand."""
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
    events: list[Event] = []
    result = launch(configure({"training.max_steps": 7, "training.log_interval": 3}), [events.append])
    told = steps(events)
    assert [event.step for event in told] == [3, 6, 7]
    assert [event.seconds for event in told] == [1.5, 3.0, 3.5]
    tokens = [0, *(event.tokens for event in told)]
    assert [event.tokens_per_second for event in told] == pytest.approx(
        [(tokens[1] - tokens[0]) / 1.5, (tokens[2] - tokens[1]) / 1.5, (tokens[3] - tokens[2]) / 0.5]
    )
    assert result.state.seconds == 3.5


@pytest.mark.parametrize(
    "changes", [{"training.max_steps": 10}, {"training.max_steps": None, "training.max_epochs": 2}]
)
def test_the_schedule_spans_the_whole_training(configure, launch, changes: dict[str, Any]) -> None:
    events: list[Event] = []
    launch(configure({"training.schedule": "linear", "training.warmup_steps": 0} | changes), [events.append])
    expected = [1e-2 * (1 - step / 11) for step in range(1, 11)]
    assert [event.learning_rate for event in steps(events)] == pytest.approx(expected)


# When it stops


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "num_steps", "reason"),
    [(3, 1, 3, "max_steps"), (7, 1, 7, "max_steps"), (None, 1, 5, "max_epochs"), (None, 2, 10, "max_epochs")],
)
def test_max_steps_replaces_max_epochs(
    configure, launch, max_steps: int | None, max_epochs: int, num_steps: int, reason: str
) -> None:
    result = launch(configure({"training.max_steps": max_steps, "training.max_epochs": max_epochs}))
    assert (result.state.step, result.state.stop_reason, result.signal_number) == (num_steps, reason, None)


def test_it_always_ends_with_an_evaluation_and_a_best(configure, launch) -> None:
    events: list[Event] = []
    changes = {"training.max_steps": 3, "training.log_interval": 100}
    result = launch(configure(changes), [events.append])
    assert [event.step for event in evaluations(events)] == [3]
    assert [event.step for event in steps(events)] == [3], "the last step is told too"
    assert result.evaluation == evaluations(events)[0].evaluation
    assert set(CheckpointManager(result.run.path.parent).names(result.run)) >= {"best", "latest"}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """Lets the evaluations of one training give these losses, one after the other."""
    evaluate = trainer.evaluate

    def script(losses: list[float]) -> None:
        remaining = iter(losses)
        monkeypatch.setattr(trainer, "evaluate", lambda *a: replace(evaluate(*a), loss=next(remaining)))

    return script


def test_patience_counts_the_ends_of_epochs_only(configure, launch, scripted, tensor_hashes) -> None:
    # At the ends of epochs: the first, too little better, better, and twice too little. Those between would change it.
    losses = {3: 9.0, 5: 5.0, 6: 1.0, 9: 9.0, 10: 4.95, 12: 9.0}
    losses |= {15: 4.7, 18: 9.0, 20: 4.65, 21: 9.0, 24: 9.0, 25: 4.61}
    changes = {"patience": 2, "stopping_threshold": 0.1, "max_steps": None, "max_epochs": 9, "eval_interval": 3}
    events: list[Event] = []
    scripted(list(losses.values()))
    config = configure({f"training.{name}": value for name, value in changes.items()})
    result = launch(config, [events.append])
    assert [event.step for event in evaluations(events)] == list(losses)
    assert (result.state.step, result.state.stop_reason) == (25, "patience")
    # `best` goes by the loss of any evaluation.
    assert [event.step for event in evaluations(events) if event.is_best] == [3, 5, 6]
    assert (result.state.best_loss, result.state.best_step) == (1.0, 6)
    best = CheckpointManager(result.run.path.parent).load(result.run, "best")
    assert (best.metadata["step"], best.metadata["best_loss"]) == (6, 1.0)
    assert tensor_hashes(result.run, "best") != tensor_hashes(result.run, "latest")
    scripted(list(losses.values()))
    stopped_there = launch(config, [stop_at(6)])
    assert tensor_hashes(result.run, "best") == tensor_hashes(stopped_there.run, "latest")


def stop_at(step: int) -> Any:
    """A callback that interrupts the training at a step."""

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            signal.raise_signal(signal.SIGINT)

    return listen


def test_without_patience_it_goes_on(configure, launch, scripted) -> None:
    scripted([5.0] * 100)
    changes = {"training.patience": None, "training.max_steps": None, "training.max_epochs": 4}
    result = launch(configure(changes))
    assert (result.state.step, result.state.stop_reason) == (20, "max_epochs")
    assert result.state.epochs_without_improvement == 3


def test_a_signal_finishes_the_step_saves_and_leaves(configure, launch) -> None:
    events: list[Event] = []
    result = launch(configure({}), [events.append, stop_at(4)])
    assert result.signal_number == signal.SIGINT
    assert (result.state.step, result.state.stop_reason) == (4, None)
    assert events[-1] == CheckpointEvent(4, "latest")
    # At the last step there is nothing to interrupt any more.
    result = launch(configure({}), [stop_at(6)])
    assert (result.state.step, result.state.stop_reason, result.signal_number) == (6, "max_steps", None)


# What it tells


def test_events_in_order(configure, launch) -> None:
    events: list[Event] = []
    changes = {"max_steps": 6, "log_interval": 2, "eval_interval": 4, "checkpoint_interval": 3}
    launch(configure({f"training.{name}": value for name, value in changes.items()}), [events.append])
    told = [
        (event.name if isinstance(event, CheckpointEvent) else type(event).__name__, event.step) for event in events
    ]
    assert told == [
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


def test_what_a_checkpoint_tells_is_written_already(configure, launch) -> None:
    seen: list[tuple[str, int]] = []

    def listen(event: Event) -> None:
        if isinstance(event, CheckpointEvent):
            (run,) = RunStore().all()
            seen.append((event.name, CheckpointManager().load(run, event.name).metadata["step"]))
            assert run.record.step == event.step

    launch(configure({"training.max_steps": 3}), [listen])
    assert seen == [("best", 3), ("latest", 3)]


def test_where_compiling_fails_it_tells_so_once_and_trains_as_without(
    configure, launch, tensor_hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    events: list[Event] = []
    run = launch(configure({"training.compile": True}), [events.append]).run
    warnings = [event for event in events if isinstance(event, WarningEvent)]
    assert [warning.step for warning in warnings] == [0]
    assert "no C++ compiler found" in warnings[0].message
    assert tensor_hashes(run, "latest") == tensor_hashes(launch(configure({})).run, "latest")
