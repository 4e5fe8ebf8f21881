"""NaN and infinity are reported with their causes, and reach neither weights nor checkpoints."""

import json
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.config.loader import dump_config
from lumiere.config.schema import RunConfig
from lumiere.data.batches import batch_at
from lumiere.data.dataset import tokenize_corpus
from lumiere.data.tokenizer import PAD
from lumiere.errors import NonFiniteError
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run
from lumiere.training import trainer
from lumiere.training.events import Callback, CheckpointEvent, EvaluationEvent, Event, WarningEvent
from lumiere.training.loss import summed_loss
from lumiere.training.nonfinite import MAX_SKIPPED_IN_A_ROW, NonFiniteGuard, listed
from lumiere.training.optim import Optimizers
from lumiere.training.schedule import learning_rate_factor
from lumiere.training.setup import set_up
from lumiere.training.state import TrainingState
from lumiere.training.trainer import train_step
from tests.training.conftest import TrainedOnce
from tests.training.short import (
    CPU,
    bits,
    hashes,
    names,
    of_kind,
    only_run,
    resume,
    saved_step,
    short,
    stop_at,
    take_step,
    train,
    windows_of,
)

NUM_STEPS = 5  # an epoch
SAVING: dict[str, Any] = {"max_steps": NUM_STEPS, "checkpoint_interval": 2}
SKIPPING = SAVING | {"on_nonfinite": "skip"}
TOO_FAST = 1e10  # a learning rate after which no product of two matrices is finite

Break = Callable[[Transformer, torch.Tensor], torch.Tensor]


def nan_loss(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def infinite_loss(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.inf


def infinite_loss_alone(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    """What is added has no gradient."""
    return loss + math.inf


def gradients_times(factor: float) -> Break:
    """Leaves the loss as it is."""

    def spoil(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
        loss.register_hook(lambda gradient: gradient * factor)
        return loss

    return spoil


def one_infinite_gradient(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    def spoil(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad[2] = math.inf
        handle.remove()

    handle = model.get_parameter("final_norm.weight").register_post_accumulate_grad_hook(spoil)
    return loss


def infinite_weight(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    model.get_parameter("final_norm.weight").data[3] = math.inf
    return loss * math.inf


nan_gradients = gradients_times(math.nan)
overflowing_norm = gradients_times(1e30)  # each is a float32, but the sum of their squares is not

Breaker = Callable[..., list[tuple[Transformer, torch.Tensor]]]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Breaker:
    """Breaks some calls of the objective, counted from `first`; returns models and tokens that it was called with."""

    def install(numbers: Collection[int], how: Break = nan_loss, first: int = 1) -> list[Any]:
        calls: list[tuple[Transformer, torch.Tensor]] = []

        def objective(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            calls.append((model, tokens))
            loss = summed_loss(model, tokens, targets)
            return how(model, loss) if first + len(calls) - 1 in numbers else loss

        monkeypatch.setattr(trainer, "summed_loss", objective)
        return calls

    return install


def refused(config: RunConfig, *callbacks: Callback, message: str | None = None) -> NonFiniteError:
    """The error in which a training run ends."""
    with pytest.raises(NonFiniteError, match=message) as caught:
        train(config, *callbacks)
    return caught.value


def tensors(state: TrainingState) -> dict[str, bytes]:
    return bits(state.model.state_dict() | state.optimizers.state_tensors())


# A step


@pytest.mark.parametrize(("part", "parts"), [(1, 1), (2, 1), (1, 3), (3, 3)])
@pytest.mark.parametrize("how", [nan_loss, infinite_loss_alone, nan_gradients, one_infinite_gradient])
def test_a_broken_step_updates_nothing(broken: Breaker, how: Break, part: int, parts: int) -> None:
    """Whichever part of it is broken: after a good step, so that the optimizer has a state to lose."""
    config = short(gradient_accumulation_steps=parts)
    windows, state = windows_of(config), TrainingState.create(config, CPU)
    take_step(state, batch_at(0, windows, 12, 0), config)
    before = tensors(state)
    assert len(before) > len(state.model.state_dict())
    broken({part}, how)
    batch = batch_at(1, windows, 12, 0)
    found = train_step(state, batch, 1.0, config.training, torch.float32, trainer.summed_loss)
    assert all(map(math.isfinite, found)) == (part > parts)
    assert (tensors(state) == before) == (part <= parts)


# Stopping


@pytest.mark.parametrize(
    ("how", "loss", "norm", "gradients"),
    [
        (nan_loss, "nan", "nan", r"token_embedding.weight, .* and \d+ more;"),
        (infinite_loss, "inf", "nan", r"token_embedding.weight, .* and \d+ more;"),
        (infinite_loss_alone, "inf", r"\d\.\d+", None),
        (nan_gradients, r"\d\.\d+", "nan", r".* and \d+ more;"),
        (one_infinite_gradient, r"\d\.\d+", "inf", "final_norm.weight;"),
        (overflowing_norm, r"\d\.\d+", "inf", None),
    ],
)
def test_training_stops_before_the_update(
    broken: Breaker, how: Break, loss: str, norm: str, gradients: str | None
) -> None:
    before: dict[str, bytes] = {}

    def break_it(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
        before.update(bits(model.state_dict()))
        return how(model, loss)

    calls = broken({4}, break_it)
    named = "" if gradients is None else f" gradients that are not finite: {gradients}"
    pattern = f"^step 4: the loss is {loss}, the norm of the gradients {norm};{named} documents of the batch: 0 "
    refused(short(**SAVING), message=pattern)
    model = calls[-1][0]
    assert bits(model.state_dict()) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    run = only_run()
    assert (run.record.status, run.record.step, saved_step(run)) == ("failed", 2, 2)
    assert str(run.record.error).startswith("NonFiniteError: step 4: ")
    assert "best" not in names(run)


def test_it_resumes_from_the_last_good_checkpoint(broken: Breaker, trained_once: TrainedOnce) -> None:
    config = short(**SAVING)
    saved: list[dict[str, str]] = []

    def look(event: Event) -> None:
        if isinstance(event, CheckpointEvent) and event.name == "latest":
            saved.append(hashes(only_run()))

    broken({4})
    error = refused(config, look, message="^step 4")
    run = only_run()
    assert [hashes(run)] == saved
    assert f"--resume {run.id} --set training.on_nonfinite=skip" in (error.hint or "")
    # Unchanged, it comes to the same step again; the hint passes it.
    broken({4}, first=3)
    with pytest.raises(NonFiniteError, match=r"^step 4"):
        resume(run)
    assert [hashes(run)] == saved
    skipping = Run(shutil.copytree(run.path, Path("skipping", run.name)))
    broken({4}, first=3)
    assert resume(skipping, overrides=["training.on_nonfinite=skip"]).state.skipped_steps == 1
    # Once the cause is gone, it ends as if nothing had been.
    broken({})
    assert resume(run).state.stop_reason == "max_steps"
    assert (run.record.status, run.record.error) == ("finished", None)
    assert hashes(run) == hashes(trained_once(config))


def test_compiled_steps_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *given: function(*given) * math.nan)
    refused(short(compile=True), message="^step 1: the loss is nan")


def test_the_documents_of_the_batch_are_named(broken: Breaker) -> None:
    config = short({"dataset.num_documents": 60}, batch_size=6, max_steps=3)
    split = tokenize_corpus(config).splits["train"]
    documents = [split.ids[first:last].tolist() for first, last in zip(split.offsets, split.offsets[1:], strict=False)]
    calls = broken({3})
    named = [int(number) for number in refused(config).message.rpartition(": ")[2].split(", ")]
    windows = [[token for token in row if token != PAD] for row in calls[-1][1].tolist()]

    def holds(document: list[int], window: list[int]) -> bool:
        return any(document[first : first + len(window)] == window for first in range(len(document)))

    assert 1 < len(named) <= 6
    assert all(any(holds(documents[number], window) for number in named) for window in windows)
    assert all(any(holds(documents[number], window) for window in windows) for number in named)


def test_only_some_of_many_documents_are_named() -> None:
    assert listed([7, 8], 2) == "7, 8"
    assert listed(range(2000), 2) == "0, 1 and 1,998 more"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"warmup_steps": 0}, "training.warmup_steps=0"),
        ({"gradient_clip_norm": None}, "training.gradient_clip_norm"),
        ({"precision": "bfloat16"}, "bfloat16"),
        ({"optimizer": "muon", "muon_learning_rate": 0.5}, "training.muon_learning_rate=0.5"),
    ],
)
def test_the_hint_names_causes_that_apply(changes: dict[str, Any], cause: str) -> None:
    def hint(**changes: Any) -> str:
        setup = set_up(short(learning_rate=0.3, **changes))
        guard = NonFiniteGuard(setup, Run(Path("run")), TrainingState.create(setup.config, CPU), print)
        with pytest.raises(NonFiniteError) as caught:
            guard.check_evaluation(math.nan)
        return caught.value.hint or ""

    given = hint(**changes)
    assert cause in given
    assert cause not in hint()
    assert "training.learning_rate=0.3 " in given
    assert "--set training.learning_rate=0.1" in given


# Explosions


def test_exploding_but_finite_gradients_are_clipped(broken: Breaker) -> None:
    broken({2}, gradients_times(1e10))
    trained = train(short(**SAVING))
    assert trained.state.step == NUM_STEPS
    norms = [event.grad_norm for event in trained.steps]
    assert norms[1] > 1e8 > max(norms[2:])
    assert trained.weights.isfinite().all()


# Skipping


def test_a_skipped_step_leaves_all_others_as_they_are(broken: Breaker) -> None:
    """The result is that of a loop without these steps: data order and learning rates do not shift."""
    config = short({"model.dropout": 0.0}, **SKIPPING)
    windows, expected = windows_of(config), TrainingState.create(config, CPU)
    for step in (0, 3, 4):
        factor = learning_rate_factor(step + 1, NUM_STEPS, config.training)
        take_step(expected, batch_at(step, windows, 12, 0), config, factor)
    broken({2, 3})
    trained = train(config)
    assert tensors(trained.state) == tensors(expected)
    assert (trained.state.step, trained.state.skipped_steps, trained.state.skipped_in_a_row) == (NUM_STEPS, 2, 0)
    assert (trained.run.record.skipped_steps, trained.run.record.status) == (2, "finished")
    assert [message.partition(":")[0] for message in trained.warnings] == ["step 2", "step 3"]
    assert [event.step for event in of_kind(WarningEvent, trained.events)] == [2, 3]
    lines = map(json.loads, trained.run.metrics_path.read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line and line["loss"] is None] == [2, 3]


def test_skipping_ends_when_nothing_is_learned_any_more(broken: Breaker) -> None:
    """A resume continues the count."""
    events: list[Event] = []
    broken(range(1, 100))
    stopped = train(short(**SKIPPING | {"max_steps": 30}), events.append, stop_at(6))
    assert stopped.state.skipped_in_a_row == 6
    last = MAX_SKIPPED_IN_A_ROW + 1
    with pytest.raises(NonFiniteError, match=f"^step {last}: ") as caught:
        resume(stopped.run, events.append)
    assert "on_nonfinite" not in (caught.value.hint or "")
    assert [event.step for event in of_kind(WarningEvent, events)] == [*range(1, last)]


# Weights and validation


def test_broken_weights_are_never_skipped(broken: Breaker) -> None:
    events: list[Event] = []
    broken({4}, infinite_weight)
    refused(short(**SKIPPING), events.append, message="weights that .*: final_norm.weight; documents")
    assert not of_kind(WarningEvent, events)
    assert saved_step(only_run()) == 2


@pytest.mark.parametrize(
    ("target", "changes", "callbacks"),
    [
        ("model", {"snapshots": True, "checkpoint_interval": 2}, []),
        ("optimizer", {"snapshots": True, "checkpoint_interval": 2}, []),
        ("model", {"checkpoint_interval": 2}, []),
        ("optimizer", {}, [stop_at(2)]),
    ],
)
def test_an_update_that_breaks_the_state_is_never_saved(
    monkeypatch: pytest.MonkeyPatch, target: str, changes: dict[str, Any], callbacks: list[Callback]
) -> None:
    step, steps = Optimizers.step, iter(range(1, 100))

    def break_second(self: Optimizers, factor: float) -> None:
        step(self, factor)
        if next(steps) == 2:
            with torch.no_grad():
                parameter = self._parameters["final_norm.weight"]
                average = self.state_tensors()["final_norm.weight.exp_avg_sq"]
                (parameter if target == "model" else average)[0] = math.inf

    monkeypatch.setattr(Optimizers, "step", break_second)
    name = "final_norm.weight" + (".exp_avg_sq" if target == "optimizer" else "")
    quiet = SAVING | {"checkpoint_interval": None}
    refused(short(**quiet | changes), *callbacks, message=f"^step 2: no longer finite, and not saved: {name} ")
    run = only_run()
    assert run.record.status == "failed"
    # A snapshot holds nothing but weights.
    snapshots = {"step-00000000", "step-00000001"} | ({"step-00000002"} if target == "optimizer" else set())
    assert set(names(run)) == (snapshots if "snapshots" in changes else set())


@pytest.mark.parametrize(("loss", "mode"), [(math.nan, "stop"), (math.inf, "skip")])
def test_a_nonfinite_validation_loss_stops_it(monkeypatch: pytest.MonkeyPatch, loss: float, mode: str) -> None:
    evaluate, losses = trainer.evaluate, iter([5.0, loss])
    monkeypatch.setattr(trainer, "evaluate", lambda *given: replace(evaluate(*given), loss=next(losses)))
    events: list[Event] = []
    config = short(max_steps=4, eval_interval=2, checkpoint_interval=None, on_nonfinite=mode)
    refused(config, events.append, message=f"^step 4: the validation loss is {loss} \\(likely")
    run = only_run()
    assert [event.step for event in of_kind(EvaluationEvent, events)] == [2]
    assert (run.record.status, run.record.step, run.record.best_loss) == ("failed", 2, 5.0)
    assert saved_step(run) == saved_step(run, "best") == 2


# The command


def test_the_command_reports_it_and_exits_with_2() -> None:
    """A learning rate that is far too high shows in the next loss."""
    Path("fast.yaml").write_text(dump_config(short(learning_rate=TOO_FAST)))
    first = CliRunner().invoke(app, ["train", "fast.yaml"])
    run = only_run()
    again = CliRunner().invoke(app, ["train", "--resume", run.id])
    for result in (first, again):
        assert result.exit_code == 2, result.output
        error, hint = result.stderr.splitlines()[-2:]
        assert error.startswith("error: step 2: the loss is nan")
        assert error.endswith("documents of the batch: 0")
        assert f"lumiere train --resume {run.id} --set training.on_nonfinite=skip" in hint
        assert run.record.status == "failed"
