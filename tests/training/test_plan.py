"""The plan of a run: which steps are measured, what follows from them, and that nothing is created."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lumiere.data.batches import batch_at
from lumiere.distributed import ProcessGroup
from lumiere.training import costs, estimate
from lumiere.training.estimate import make_plan, measure_activations, measure_evaluation, peak_memory
from lumiere.training.setup import set_up
from lumiere.training.state import TrainingState
from tests.training.short import CPU, PEAK_FLOPS, short

StepsTake = Callable[[Iterator[float]], None]


def no_warning(message: str) -> None:
    raise AssertionError(message)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The windows of evaluations, each of which takes 0.25 seconds."""
    scored: list[Any] = []

    def evaluate(model: Any, windows: Any, facts: Any, batch_size: int) -> SimpleNamespace:
        scored.append(windows)
        return SimpleNamespace(seconds=0.25 * len(windows), num_windows=len(windows))

    monkeypatch.setattr(estimate, "evaluate", evaluate)
    return scored


@pytest.fixture
def steps_take(monkeypatch: pytest.MonkeyPatch, evaluated: list[Any]) -> StepsTake:
    """Lets the steps of a plan take these seconds, one after the other."""

    def script(durations: Iterator[float]) -> None:
        now, looks = 0.0, itertools.count(1)

        def perf_counter() -> float:
            nonlocal now
            now += next(durations) if next(looks) % 2 == 0 else 0.0
            return now

        monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=perf_counter))

    return script


def test_every_number_of_a_scripted_plan(steps_take: StepsTake) -> None:
    setup = set_up(short(max_steps=1000, eval_interval=3, patience=5))
    config, corpus = setup.config, setup.corpus
    # Two warm up; then five seconds are measured.
    steps_take(iter([10.0, 4.0, 1.5, 3.0, 2.0]))
    plan = make_plan(setup, no_warning)
    assert (plan.measured_steps, plan.seconds_per_step, plan.startup_seconds) == (3, 2.0, 10.0 + 4.0 - 2 * 2.0)
    windows = corpus.windows("train", config)
    targets = [batch_at(step, windows, 12, 0).num_targets for step in (2, 3, 4)]
    assert len(set(targets)) > 1
    assert plan.tokens_per_second == pytest.approx(sum(targets) / 3 / 2.0)
    assert plan.mfu == pytest.approx(plan.tokens_per_second * costs.flops_per_token(config) / PEAK_FLOPS)
    assert plan.seconds_per_evaluation == pytest.approx(0.25 * len(corpus.windows("validation", config)))
    assert (plan.epoch_steps, plan.total_steps, plan.earliest_stop) == (5, 1000, 30)
    # Every third step and every fifth, those of both once, and the last is a fifth.
    assert plan.num_evaluations == 333 + 200 - 66
    assert plan.total_seconds == pytest.approx(10 + 1000 * 2.0 + 467 * plan.seconds_per_evaluation)
    assert (plan.device, plan.precision, plan.peak_flops) == ("cpu", "float32", PEAK_FLOPS)
    assert plan.num_windows == len(windows)
    assert plan.parameters.total == setup.num_parameters
    assert plan.disk == costs.disk(config, 1000)
    weights = 4 * setup.num_parameters
    assert (plan.memory.weights, plan.memory.gradients, plan.memory.optimizer) == (weights, weights, 2 * weights)


@pytest.mark.parametrize(
    ("durations", "measured"),
    [
        (itertools.repeat(100.0), 3),
        (itertools.repeat(1.0), 5),
        (itertools.repeat(0.25), 20),
        (iter([1.0, 1.0, 2.0, 2.0, 2.0]), 3),  # first steps that are faster save no time
    ],
)
def test_it_measures_five_seconds_and_at_least_three_steps(
    steps_take: StepsTake, durations: Iterator[float], measured: int
) -> None:
    steps_take(durations)
    plan = make_plan(set_up(short()), no_warning)
    assert (plan.measured_steps, plan.startup_seconds) == (measured, 0.0)


@pytest.mark.parametrize(("parallel", "shares"), [("ddp", 1), ("fsdp", 3)])
def test_processes_share_the_windows_and_with_fsdp_the_weights(
    steps_take: StepsTake, parallel: str, shares: int
) -> None:
    steps_take(itertools.repeat(1.0))
    config = short(parallel=parallel, batch_size=12)
    plan = make_plan(set_up(config), no_warning, ProcessGroup(0, 3))
    weights = costs.weight_bytes(config)
    assert plan.windows_per_process == 4
    assert (plan.memory.weights, plan.memory.gradients) == (weights // shares, weights // shares)
    assert plan.memory.optimizer == 2 * weights // shares


def test_it_really_measures_and_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if compiling fails: then it warns."""

    def fails(*arguments: Any) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.01)
    before, warnings = set(tmp_path.rglob("*")), []
    plan = make_plan(set_up(short(optimizer="muon", compile=True)), warnings.append)
    assert set(tmp_path.rglob("*")) == before
    assert plan.measured_steps >= 3
    assert 0 < plan.seconds_per_step * plan.total_steps < plan.total_seconds
    assert plan.memory.activations > 0
    (warning,) = warnings
    assert warning.endswith("no C++ compiler found")


def test_an_evaluation_is_extrapolated_from_the_first_windows(
    evaluated: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = set_up(short({"dataset.num_documents": 10}))
    whole = setup.corpus.windows("validation", setup.config)
    monkeypatch.setattr(estimate, "EVALUATION_BATCHES", 2)
    seconds = measure_evaluation(setup, TrainingState.create(setup.config, CPU).model)
    (beginning,) = evaluated
    assert 2 * 12 <= len(beginning) < len(whole)
    assert seconds == pytest.approx(0.25 * len(whole))
    # All except the window in which the text is cut are windows of the whole.
    same = np.arange(len(beginning) - 1)
    assert np.array_equal(beginning.cut(same)[0], whole.cut(same)[0])


def test_activations_are_what_the_backward_pass_needs() -> None:
    setup = set_up(short({"model.dropout": 0.0}, gradient_accumulation_steps=3))
    model = TrainingState.create(setup.config, CPU).model

    def objective(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        powers = model.token_embedding(tokens).exp()
        assert tokens.shape == (4, 16), "a third of the batch"
        return (powers.sin() @ model.blocks[0].attention.query.weight.T).sum()

    # The ids (int64) for the embedding; for exp its result, which sin reads too; for the product what it reads, and the
    # weight, which is no activation.
    rows = 4 * 16
    ids = setup.config.training.batch_size * 16 * 8  # the parts of a batch share its memory
    assert measure_activations(setup, model, objective) == ids + rows * 16 * 4 + rows * 16 * 4


def test_peak_memory_is_that_of_the_process_or_of_a_gpus_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device.index == 1 else 0)
    assert peak_memory(torch.device("cuda:1")) == 7
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc to compare with")
    peak = peak_memory(CPU)
    highest = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), flags=re.MULTILINE)
    assert highest
    assert peak
    # A process also inherits the peak of its parent.
    assert 0.9 * 1024 * int(highest[1]) < peak < 100 * 1024 * int(highest[1])
