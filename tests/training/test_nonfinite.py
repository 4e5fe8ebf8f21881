"""Numbers that are not finite: they are told with what leads to them, and reach neither weights nor checkpoints."""

import json
import math
import signal
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.config.loader import dump_config
from lumiere.data.batches import batch_at
from lumiere.data.dataset import tokenize_corpus
from lumiere.data.tokenizer import PAD
from lumiere.errors import NonFiniteError
from lumiere.models.transformer import Transformer
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import trainer
from lumiere.training.events import Callback, CheckpointEvent, EvaluationEvent, Event, StepEvent, WarningEvent
from lumiere.training.loss import summed_loss
from lumiere.training.nonfinite import MAX_SKIPPED_IN_A_ROW
from lumiere.training.optim import Optimizers
from lumiere.training.run import resume
from lumiere.training.schedule import learning_rate_factor
from lumiere.training.setup import set_up_resume
from lumiere.training.state import TrainingState
from lumiere.training.trainer import TrainingResult, train_step

CPU = torch.device("cpu")
NUM_STEPS = 5  # an epoch
SAVING = {"training.max_steps": NUM_STEPS, "training.checkpoint_interval": 2}
SKIPPING = SAVING | {"training.on_nonfinite": "skip"}
TOO_FAST = 1e10  # a learning rate after which no product of two matrices is finite

Break = Callable[[Transformer, torch.Tensor], torch.Tensor]
Calls = list[tuple[Transformer, torch.Tensor]]
Breaker = Callable[..., Calls]


def nan_loss(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def infinite_loss(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.inf


def infinite_loss_alone(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    """What is added has no gradient."""
    return loss + math.inf


def nan_gradients(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    """The loss is as it was; what comes back from it is not."""
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


def one_infinite_gradient(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    def spoil(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad[2] = math.inf
        handle.remove()

    handle = model.final_norm.weight.register_post_accumulate_grad_hook(spoil)
    return loss


def gradients_whose_norm_overflows(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    """Each is a float32, the sum of their squares is not."""
    loss.register_hook(lambda gradient: gradient * 1e30)
    return loss


def enormous_gradients(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * 1e10)
    return loss


def infinite_weight(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
    model.final_norm.weight.data[3] = math.inf
    return loss * math.inf


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Breaker:
    """Breaks some calls of the objective, counted on from `first`; gives models and tokens that it was called with."""

    def install(numbers: Collection[int], how: Break = nan_loss, first: int = 1) -> Calls:
        calls: Calls = []

        def objective(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            calls.append((model, tokens))
            loss = summed_loss(model, tokens, targets)
            return how(model, loss) if first + len(calls) - 1 in numbers else loss

        monkeypatch.setattr(trainer, "summed_loss", objective)
        return calls

    return install


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def stop_at(step: int) -> Callback:
    """Ctrl-C during a step."""

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            signal.raise_signal(signal.SIGINT)

    return listen


def go_on(run: Run, *callbacks: Callback) -> TrainingResult:
    return resume(set_up_resume(run), run, callbacks)


def only_run() -> Run:
    (run,) = RunStore().all()
    return run


def latest_step(run: Run) -> int:
    checkpoint, name = CheckpointManager().load_latest(run)
    assert name == "latest"
    return checkpoint.metadata["step"]


# A step


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("part", [1, 2, 3])
@pytest.mark.parametrize("how", [nan_loss, infinite_loss_alone, nan_gradients, one_infinite_gradient])
def test_a_broken_step_updates_nothing(configure, broken: Breaker, how: Break, part: int, parts: int) -> None:
    """Whichever part of it is broken: after a good step, so that the optimizer has a state to lose."""
    config = configure({"training.gradient_accumulation_steps": parts})
    windows = tokenize_corpus(config).windows("train", config)
    state = TrainingState.create(config, CPU)

    def step(number: int) -> tuple[float, float]:
        batch = batch_at(number, windows, 12, 0)
        return train_step(state, batch, 1.0, config.training, torch.float32, trainer.summed_loss)

    def everything() -> dict[str, bytes]:
        return bits(state.model.state_dict() | state.optimizers.state_tensors())

    step(0)
    before = everything()
    assert len(before) > len(state.model.state_dict())
    broken({part}, how)
    assert all(map(math.isfinite, step(1))) == (part > parts)
    assert (everything() == before) == (part <= parts)


# Stopping


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (nan_loss, r"the loss is nan, the norm of the gradients nan; .* token_embedding.weight, .* and \d+ more;"),
        (infinite_loss, r"the loss is inf, the norm of the gradients nan; .* token_embedding.weight, .* and \d+ more;"),
        (
            infinite_loss_alone,
            r"the loss is inf, the norm of the gradients \d\.\d+; documents of the batch: 0 \(likely",
        ),
        (nan_gradients, r"the loss is \d\.\d+, the norm of the gradients nan; .* and \d+ more;"),
        (one_infinite_gradient, r"the norm of the gradients inf; gradients that are not finite: final_norm.weight;"),
        (gradients_whose_norm_overflows, r"the norm of the gradients inf; documents of the batch: 0 \(likely"),
    ],
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_training_stops_before_the_update(
    configure, launch, broken: Breaker, how: Break, problem: str, clip: float | None
) -> None:
    config = configure(SAVING | {"training.gradient_clip_norm": clip})
    before: dict[str, bytes] = {}

    def break_it(model: Transformer, loss: torch.Tensor) -> torch.Tensor:
        before.update(bits(model.state_dict()))
        return how(model, loss)

    calls = broken({4}, break_it)
    with pytest.raises(NonFiniteError, match=problem) as caught:
        launch(config)
    assert caught.value.message.startswith("step 4: ")
    model = calls[-1][0]
    assert bits(model.state_dict()) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    run = only_run()
    assert (run.record.status, run.record.step) == ("failed", 2)
    assert run.record.error.startswith("NonFiniteError: step 4: ")
    assert latest_step(run) == 2
    assert "best" not in CheckpointManager().names(run)


def test_it_goes_on_from_the_last_good_checkpoint(configure, launch, broken: Breaker, tensor_hashes) -> None:
    config = configure(SAVING)
    never_broken = launch(config).run
    saved: list[dict[str, str]] = []

    def listen(event: Event) -> None:
        if isinstance(event, CheckpointEvent) and event.name == "latest":
            saved.append(tensor_hashes(RunStore().all()[0], "latest"))

    broken({4})
    with pytest.raises(NonFiniteError, match="step 4") as caught:
        launch(config, [listen])
    run = RunStore().open("latest")
    assert run != never_broken
    assert len(saved) == 1
    assert tensor_hashes(run, "latest") == saved[0]
    way_out = f"lumiere train --resume {run.id} --set training.on_nonfinite=skip resumes from"
    assert f"{way_out} the last good checkpoint, step 2" in (caught.value.hint or "")
    # As it is, it comes to the same step again; the way out passes it.
    broken({4}, first=3)
    with pytest.raises(NonFiniteError, match="step 4"):
        go_on(run)
    assert tensor_hashes(run, "latest") == saved[0]
    broken({4}, first=3)
    setup = set_up_resume(run, overrides=["training.on_nonfinite=skip"])
    assert resume(setup, run, [stop_at(4)]).state.skipped_steps == 1
    # And with what broke it gone, as if nothing had been.
    run = launch(config, [stop_at(2)]).run
    broken({4}, first=3)
    with pytest.raises(NonFiniteError, match="step 4"):
        go_on(run)
    broken({})
    assert go_on(run).state.stop_reason == "max_steps"
    assert (run.record.status, run.record.error) == ("finished", None)
    assert tensor_hashes(run, "latest") == tensor_hashes(never_broken, "latest")


def test_compiled_steps_are_looked_at_too(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_badly(function: Any, **options: Any) -> Any:
        return lambda *arguments: function(*arguments) * math.nan

    monkeypatch.setattr(torch, "compile", compile_badly)
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        launch(configure({"training.compile": True}))


def test_the_documents_of_the_batch_are_named(configure, launch, broken: Breaker) -> None:
    config = configure({"dataset.num_documents": 60, "training.batch_size": 6, "training.max_steps": 3})
    split = tokenize_corpus(config).splits["train"]
    documents = [split.ids[first:last].tolist() for first, last in zip(split.offsets, split.offsets[1:], strict=False)]
    calls = broken({3})
    with pytest.raises(NonFiniteError) as caught:
        launch(config)
    named = [int(number) for number in caught.value.message.partition("documents of the batch: ")[2].split(", ")]
    windows = [[token for token in row if token != PAD] for row in calls[-1][1].tolist()]

    def holds(document: list[int], window: list[int]) -> bool:
        return any(document[first : first + len(window)] == window for first in range(len(document)))

    assert 1 < len(named) <= 6
    assert all(any(holds(documents[number], window) for number in named) for window in windows)
    assert all(any(holds(documents[number], window) for window in windows) for number in named)


def test_of_many_documents_some_are_named(configure, launch, broken: Breaker) -> None:
    broken({1})
    changes = {"dataset.num_documents": 60, "training.batch_size": 200, "training.max_steps": 1}
    with pytest.raises(NonFiniteError) as caught:
        launch(configure(changes))
    listed, _, rest = caught.value.message.partition("documents of the batch: ")[2].partition(" and ")
    numbers = [int(number) for number in listed.split(", ")]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 32
    assert 32 + int(rest.removesuffix(" more")) <= 60


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"warmup_steps": 0}, "there is no warm-up"),
        ({"gradient_clip_norm": None}, "nothing is clipped"),
        ({"precision": "bfloat16"}, "bfloat16 is too coarse"),
        ({"optimizer": "muon", "muon_learning_rate": 0.5}, "training.muon_learning_rate=0.5 is too high"),
        ({"on_nonfinite": "stop"}, "training.on_nonfinite=skip resumes"),
    ],
)
def test_the_hint_names_the_causes_that_there_are(
    configure, launch, broken: Breaker, changes: dict[str, Any], cause: str
) -> None:
    def hint(changes: dict[str, Any]) -> str:
        broken(range(1, 100))
        settings = {"max_steps": 20, "learning_rate": 0.3, "on_nonfinite": "skip"} | changes
        with pytest.raises(NonFiniteError) as caught:
            launch(configure({f"training.{name}": value for name, value in settings.items()}))
        return caught.value.hint or ""

    given = hint(changes)
    assert cause in given
    assert cause not in hint({})
    assert "training.learning_rate=0.3 is too high" in given
    assert "--set training.learning_rate=0.1" in given


# What explodes


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_learning_rate_that_is_far_too_high_is_found_at_the_next_loss(configure, launch, clip: float | None) -> None:
    config = configure({"training.learning_rate": TOO_FAST, "training.gradient_clip_norm": clip})
    events: list[Event] = []
    with pytest.raises(NonFiniteError, match="step 2: the loss is nan"):
        launch(config, [events.append])
    assert [event.step for event in events if isinstance(event, StepEvent)] == [1]
    assert (only_run().record.status, only_run().record.step) == ("failed", 0)


def test_gradients_that_explode_and_are_finite_are_clipped(configure, launch, broken: Breaker) -> None:
    events: list[Event] = []
    broken({2}, enormous_gradients)
    state = launch(configure(SAVING), [events.append]).state
    assert state.step == NUM_STEPS
    norms = [event.grad_norm for event in events if isinstance(event, StepEvent)]
    assert norms[1] > 1e8 > max(norms[2:])
    assert all(parameter.isfinite().all() for parameter in state.model.parameters())


# Skipping


def test_a_skipped_step_leaves_all_others_as_they_are(configure, launch, broken: Breaker) -> None:
    """The same as a loop that simply has no such steps: data order and learning rates go on."""
    config = configure(SKIPPING | {"model.dropout": 0.0})
    windows = tokenize_corpus(config).windows("train", config)
    expected = TrainingState.create(config, CPU)
    for step in (0, 3, 4):
        factor = learning_rate_factor(step + 1, NUM_STEPS, config.training)
        train_step(expected, batch_at(step, windows, 12, 0), factor, config.training, torch.float32, summed_loss)
    broken({2, 3})
    events: list[Event] = []
    result = launch(config, [events.append])
    assert bits(result.state.model.state_dict()) == bits(expected.model.state_dict())
    assert bits(result.state.optimizers.state_tensors()) == bits(expected.optimizers.state_tensors())
    assert (result.state.step, result.state.skipped_steps, result.state.skipped_in_a_row) == (NUM_STEPS, 2, 0)
    assert result.run.record.skipped_steps == 2
    assert result.run.record.status == "finished"
    warnings = [event for event in events if isinstance(event, WarningEvent)]
    assert [warning.step for warning in warnings] == [2, 3]
    assert warnings[0].message.startswith("step 2: the loss is nan")
    assert warnings[0].message.endswith("documents of the batch: 0; its update is skipped")
    lines = [json.loads(line) for line in result.run.metrics_path.read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert [step for step, loss in losses.items() if loss is None] == [2, 3]


def test_skipping_ends_when_nothing_is_learnt_any_more(configure, launch, broken: Breaker) -> None:
    last = MAX_SKIPPED_IN_A_ROW + 1
    events: list[Event] = []
    broken(range(1, 100))
    with pytest.raises(NonFiniteError, match=f"^step {last}: .*; the 10 steps before were skipped already \\(likely"):
        launch(configure(SKIPPING | {"training.max_steps": 30}), [events.append])
    assert [event.step for event in events if isinstance(event, WarningEvent)] == [*range(1, last)]


def test_a_good_step_starts_the_count_again(configure, launch, broken: Breaker) -> None:
    good = MAX_SKIPPED_IN_A_ROW + 1
    broken({*range(1, 2 * good)} - {good})
    state = launch(configure(SKIPPING | {"training.max_steps": 2 * good})).state
    assert (state.skipped_steps, state.skipped_in_a_row) == (2 * MAX_SKIPPED_IN_A_ROW, 0)


def test_a_resume_goes_on_counting(configure, launch, broken: Breaker) -> None:
    broken(range(1, 100))
    first = launch(configure(SKIPPING | {"training.max_steps": 30}), [stop_at(6)])
    assert (first.state.step, first.state.skipped_in_a_row) == (6, 6)
    broken(range(1, 100))
    with pytest.raises(NonFiniteError, match=f"^step {MAX_SKIPPED_IN_A_ROW + 1}: "):
        go_on(first.run)


# Weights and validation


@pytest.mark.parametrize("changes", [SAVING, SKIPPING])
def test_broken_weights_are_told_apart_and_never_skipped(
    configure, launch, broken: Breaker, changes: dict[str, Any]
) -> None:
    events: list[Event] = []
    broken({4}, infinite_weight)
    with pytest.raises(NonFiniteError, match=r"weights that were not finite before: final_norm.weight; documents"):
        launch(configure(changes), [events.append])
    assert not any(isinstance(event, WarningEvent) for event in events)
    assert latest_step(only_run()) == 2


@pytest.mark.parametrize(
    ("changes", "callbacks"),
    [
        ({"training.snapshots": True, "training.checkpoint_interval": 2}, []),
        ({"training.checkpoint_interval": 2}, []),
        ({}, [stop_at(2)]),
    ],
)
@pytest.mark.parametrize("target", ["model", "optimizer"])
def test_an_update_that_breaks_the_state_is_never_saved(
    configure,
    launch,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    callbacks: list[Callback],
    target: str,
) -> None:
    steps = 0

    def break_second(self: Optimizers, factor: float) -> None:
        nonlocal steps
        steps += 1
        step(self, factor)
        if steps == 2:
            with torch.no_grad():
                parameter = self._parameters["final_norm.weight"]
                average = self.state_tensors()["final_norm.weight.exp_avg_sq"]
                (parameter if target == "model" else average)[0] = math.inf

    step = Optimizers.step
    monkeypatch.setattr(Optimizers, "step", break_second)
    quiet = {"training.snapshots": False, "training.checkpoint_interval": None}
    name = "final_norm.weight" + (".exp_avg_sq" if target == "optimizer" else "")
    with pytest.raises(NonFiniteError, match=f"^step 2: no longer finite, and not saved: {name} "):
        launch(configure(SAVING | quiet | changes), callbacks)
    run = only_run()
    assert run.record.status == "failed"
    # A snapshot holds nothing but weights.
    snapshots = {"step-00000000", "step-00000001"} | ({"step-00000002"} if target == "optimizer" else set())
    assert set(CheckpointManager().names(run)) == (snapshots if "training.snapshots" in changes else set())


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_validation_loss_that_is_not_finite_stops_it(
    configure, launch, monkeypatch: pytest.MonkeyPatch, tensor_hashes, loss: float, mode: str
) -> None:
    evaluate = trainer.evaluate
    losses = iter([5.0, loss])
    monkeypatch.setattr(trainer, "evaluate", lambda *a: replace(evaluate(*a), loss=next(losses)))
    events: list[Event] = []
    changes = {"max_steps": 4, "eval_interval": 2, "checkpoint_interval": None, "on_nonfinite": mode}
    with pytest.raises(NonFiniteError, match=f"^step 4: the validation loss is {loss} \\(likely"):
        launch(configure({f"training.{name}": value for name, value in changes.items()}), [events.append])
    run = only_run()
    assert [event.step for event in events if isinstance(event, EvaluationEvent)] == [2]
    assert (run.record.status, run.record.step, run.record.best_loss) == ("failed", 2, 5.0)
    assert latest_step(run) == CheckpointManager().load(run, "best").metadata["step"] == 2


# The command


def test_the_command_says_what_happened_and_leaves_with_2(configure) -> None:
    Path("fast.yaml").write_text(dump_config(configure({"training.learning_rate": TOO_FAST})))
    result = CliRunner().invoke(app, ["train", "fast.yaml"])
    assert result.exit_code == 2, result.output
    error, hint = result.stderr.splitlines()[-2:]
    assert error.startswith("error: step 2: the loss is nan")
    assert error.endswith("documents of the batch: 0")
    assert hint.startswith("hint: likely causes: training.learning_rate=1e+10 is too high")
    run = only_run()
    assert f"lumiere train --resume {run.id} --set training.on_nonfinite=skip" in hint
    assert "from the start: nothing was saved yet" in hint
    assert run.record.status == "failed"
    result = CliRunner().invoke(app, ["train", "--resume", run.id])
    assert (result.exit_code, result.stderr.splitlines()[-2]) == (2, error), "the same again"
    assert run.status == "failed"
