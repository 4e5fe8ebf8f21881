"""The plan of a training: which steps are measured, what follows from them, and that nothing is made."""

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
from lumiere.training.setup import TrainingSetup, set_up
from lumiere.training.state import TrainingState

CPU = torch.device("cpu")


def no_warning(message: str) -> None:
    raise AssertionError(message)


@pytest.fixture
def steps_take(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[float]], None]:
    """Lets the steps of a plan take these seconds, one after the other, and each window of an evaluation 0.25."""

    def script(durations: Iterator[float]) -> None:
        now, looks = 0.0, 0

        def perf_counter() -> float:
            nonlocal now, looks
            looks += 1
            if looks % 2 == 0:
                now += next(durations)
            return now

        def evaluate(model: Any, windows: Any, facts: Any, batch_size: int) -> SimpleNamespace:
            return SimpleNamespace(seconds=0.25 * len(windows), num_windows=len(windows))

        monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=perf_counter))
        monkeypatch.setattr(estimate, "evaluate", evaluate)

    return script


def forever(seconds: float) -> Iterator[float]:
    while True:
        yield seconds


def test_figures_of_a_script(configure, steps_take) -> None:
    setup = set_up(configure({"training.max_steps": 1000, "training.eval_interval": 3, "training.patience": 5}))
    config, corpus = setup.config, setup.corpus
    # Two that warm up, and then until five seconds are over.
    steps_take(iter([10.0, 4.0, 1.5, 3.0, 2.0]))
    made = make_plan(setup, no_warning)
    assert (made.measured_steps, made.seconds_per_step, made.startup_seconds) == (3, 2.0, 10.0 + 4.0 - 2 * 2.0)
    windows = corpus.windows("train", config)
    targets = [batch_at(step, windows, 12, 0).num_targets for step in (2, 3, 4)]
    assert len(set(targets)) > 1
    assert made.tokens_per_second == pytest.approx(sum(targets) / 3 / 2.0)
    assert made.mfu == pytest.approx(made.tokens_per_second * costs.flops_per_token(config) / 2e11)
    assert made.seconds_per_evaluation == pytest.approx(0.25 * len(corpus.windows("validation", config)))
    assert (made.epoch_steps, made.total_steps, made.earliest_stop) == (5, 1000, 30)
    # Every third step and every fifth, those of both once, and the last is a fifth.
    assert made.num_evaluations == 333 + 200 - 66
    assert made.total_seconds == pytest.approx(10 + 1000 * 2.0 + 467 * made.seconds_per_evaluation)
    assert (made.device, made.precision, made.peak_flops) == ("cpu", "float32", 2e11)
    assert made.num_windows == len(windows)
    assert made.parameters.total == setup.num_parameters
    assert made.disk == costs.disk(config, 1000)
    weights = 4 * setup.num_parameters
    assert (made.memory.weights, made.memory.gradients, made.memory.optimizer) == (weights, weights, 2 * weights)


@pytest.mark.parametrize(("seconds", "measured"), [(100.0, 3), (1.0, 5), (0.25, 20)])
def test_it_measures_five_seconds_and_at_least_three_steps(
    configure, steps_take, seconds: float, measured: int
) -> None:
    steps_take(forever(seconds))
    made = make_plan(set_up(configure({})), no_warning)
    assert (made.measured_steps, made.startup_seconds) == (measured, 0.0)


@pytest.mark.parametrize(("parallel", "shares"), [("ddp", 1), ("fsdp", 3)])
def test_each_of_several_processes_has_its_share_of_the_windows_and_with_fsdp_of_the_weights(
    configure, steps_take, parallel: str, shares: int
) -> None:
    steps_take(forever(1.0))
    config = configure({"training.parallel": parallel, "training.batch_size": 12})
    made = make_plan(set_up(config), no_warning, ProcessGroup(0, 3))
    weights = costs.weight_bytes(config)
    assert made.windows_per_process == 4
    assert (made.memory.weights, made.memory.gradients) == (weights // shares, weights // shares)
    assert made.memory.optimizer == 2 * weights // shares


def test_first_steps_that_are_faster_save_no_time(configure, steps_take) -> None:
    steps_take(iter([1.0, 1.0, 2.0, 2.0, 2.0]))
    assert make_plan(set_up(configure({})), no_warning).startup_seconds == 0.0


def test_it_really_measures_and_makes_nothing(configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.01)
    setup = set_up(configure({"training.optimizer": "muon"}))
    before = set(tmp_path.rglob("*"))
    made = make_plan(setup, no_warning)
    assert set(tmp_path.rglob("*")) == before
    assert made.measured_steps >= 3
    assert 0 < made.seconds_per_step * made.total_steps < made.total_seconds
    assert made.memory.activations > 0


def test_where_compiling_fails_it_says_so_and_measures_without(
    configure, steps_take, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    steps_take(forever(2.0))
    warnings: list[str] = []
    made = make_plan(set_up(configure({"training.compile": True})), warnings.append)
    assert made.measured_steps == 3
    assert len(warnings) == 1
    assert "no C++ compiler found" in warnings[0]


# Evaluation


def test_an_evaluation_is_extrapolated_from_the_first_windows(configure, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = set_up(configure({"dataset.num_documents": 10}))
    whole = setup.corpus.windows("validation", setup.config)
    scored: list[Any] = []

    def evaluate(model: Any, windows: Any, facts: Any, batch_size: int) -> SimpleNamespace:
        scored.append(windows)
        return SimpleNamespace(seconds=3.0, num_windows=len(windows))

    monkeypatch.setattr(estimate, "evaluate", evaluate)
    monkeypatch.setattr(estimate, "EVALUATION_BATCHES", 2)
    model = TrainingState.create(setup.config, CPU).model
    seconds = measure_evaluation(setup, model)
    (beginning,) = scored
    assert 2 * 12 <= len(beginning) < len(whole)
    assert seconds == pytest.approx(3.0 * len(whole) / len(beginning))
    # All but the one in which the text is cut are windows of the whole.
    same = np.arange(len(beginning) - 1)
    assert np.array_equal(beginning.cut(same)[0], whole.cut(same)[0])


# Memory


@pytest.fixture
def setup(configure) -> TrainingSetup:
    return set_up(configure({"model.dropout": 0.0, "training.gradient_accumulation_steps": 3}))


def test_activations_are_what_the_backward_pass_needs(setup: TrainingSetup) -> None:
    model = TrainingState.create(setup.config, CPU).model

    def objective(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        powers = model.token_embedding(tokens).exp()
        assert tokens.shape == (4, 16), "a third of the batch"
        return (powers.sin() @ model.blocks[0].attention.query.weight.T).sum()

    # The ids (int64) for the embedding; for exp its result, which is what sin reads too; for the product what it reads,
    # and the weight, which is no activation.
    rows = 4 * 16
    ids = setup.config.training.batch_size * 16 * 8  # the parts of a batch share its memory
    assert measure_activations(setup, model, objective) == ids + rows * 16 * 4 + rows * 16 * 4


def test_peak_memory_is_that_of_the_process() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc to compare with")
    peak = peak_memory(CPU)
    highest = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), flags=re.MULTILINE)
    assert highest
    assert peak
    # A process also inherits the peak of the one that started it.
    assert 0.9 * 1024 * int(highest[1]) < peak < 100 * 1024 * int(highest[1])


def test_peak_memory_of_a_gpu_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device.index == 1 else 0)
    assert peak_memory(torch.device("cuda:1")) == 7
