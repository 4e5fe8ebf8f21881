"""Resuming is exact: wherever a run was interrupted, killed or damaged, it ends with the bits of one that was not."""

import functools
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lumiere.config.loader import parse_override
from lumiere.config.schema import RunConfig
from lumiere.errors import LumiereError
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run
from lumiere.training.events import Callback, CheckpointEvent, EvaluationEvent, Event, StartEvent, StepEvent
from lumiere.training.run import stop_reason
from lumiere.training.setup import set_up, set_up_resume
from lumiere.training.state import COUNTERS
from tests.checkpoints import remove_pointers
from tests.training.conftest import TrainedOnce
from tests.training.short import damage, hashes, names, only_run, resume, short, stop_at, train

NUM_STEPS = 8
LONGER = short(max_steps=NUM_STEPS, eval_interval=3, checkpoint_interval=4, ema_decay=0.5, snapshots=True)
AUTO = short(device="auto", precision="auto")


class KilledError(Exception):
    """Stands for a sudden death: nothing is saved on the way out."""


def kill_at(number: int) -> Callback:
    """Sudden death at the event of this number."""
    seen = iter(range(number + 1))

    def call(event: Event) -> None:
        if next(seen) == number:
            raise KilledError(str(event))

    return call


def outcome(run: Run) -> dict[str, Any]:
    """All that training leaves behind, except what depends on the clock."""
    manager = CheckpointManager(run.path.parent)
    saved = {name: manager.load(run, name, groups=()).metadata for name in ("best", "latest")}
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return {
        "tensors": {name: hashes(run, name) for name in names(run) if name != "previous"},
        "counters": {name: {key: saved[name][key] for key in COUNTERS if key != "seconds"} for name in saved},
        "metrics": [
            {key: line[key] for key in line if key not in ("time", "tokens_per_second", "mfu")} for line in lines
        ],
    }


@functools.cache
def uninterrupted(**changes: Any) -> tuple[dict[str, Any], list[Event]]:
    """What a run that is never interrupted leaves behind, and its events."""
    trained = train(longer(**changes), runs_dir="uninterrupted")
    return outcome(trained.run), list(trained.events)


def longer(**changes: Any) -> RunConfig:
    return LONGER.model_copy(update={"training": LONGER.training.model_copy(update=changes)})


def assert_exact(run: Run, **changes: Any) -> None:
    assert outcome(run) == uninterrupted(**changes)[0]


def test_the_uninterrupted_run_has_everything_that_could_differ() -> None:
    left, events = uninterrupted()
    assert [line["step"] for line in left["metrics"] if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert [line["step"] for line in left["metrics"] if "val_loss" in line] == [3, 5, 6, 8]
    assert {name.partition(".")[0] for name in left["tensors"]["latest"]} == {"model", "optimizer", "rng"}
    assert left["counters"]["latest"]["stop_reason"] == "max_steps"
    assert len(events) == 1 + 8 + 4 + sum(isinstance(event, CheckpointEvent) for event in events)


# No epoch improves by 100 nats: the first one sets the loss to beat, and the two after it exhaust the patience.
IMPATIENT = {"max_steps": None, "max_epochs": 9, "patience": 2, "stopping_threshold": 100.0}
FORTY = {"max_steps": 40, "optimizer": "muon", "random_window_offset": True}


@pytest.mark.parametrize(
    ("changes", "step", "end"),
    [
        ({}, 2, (NUM_STEPS, "max_steps")),
        ({"optimizer": "muon"}, 4, (NUM_STEPS, "max_steps")),
        (IMPATIENT, 11, (15, "patience")),
    ],
)
def test_interrupted_once(changes: dict[str, Any], step: int, end: tuple[int, str]) -> None:
    first = train(longer(**changes), stop_at(step))
    run = first.run
    assert (first.state.step, first.result.signal_number) == (step, signal.SIGINT)
    assert (run.record.status, stop_reason(run)) == ("interrupted", None)
    second = resume(run)
    started, steps = second.events[0], [event.step for event in second.steps]
    assert isinstance(started, StartEvent)
    assert [started.step, *steps] == [*range(step, end[0] + 1)]
    assert second.end == (run.record.step, run.record.stop_reason) == end
    assert second.state.seconds > first.state.seconds
    assert run.record.status == "finished"
    assert_exact(run, **changes)


@pytest.mark.parametrize("changes", [{}, pytest.param(FORTY, marks=pytest.mark.slow)])
def test_interrupted_at_every_step(changes: dict[str, Any]) -> None:
    config = longer(**changes)
    run = train(config, stop_at(1)).run
    for step in range(2, config.training.max_steps or 0):
        assert resume(run, stop_at(step)).end == (step, None)
    resume(run)
    assert_exact(run, **changes)


# The start, before and after the last step without a checkpoint, the first evaluation, everything from the save of step
# 4, which has a snapshot, to the step after the first epoch, and the very end.
@pytest.mark.parametrize("number", [0, 3, 4, *range(8, 14), -1])
def test_killed_at_any_event(number: int) -> None:
    events = uninterrupted()[1]
    before = events[: number % len(events) + 1]
    with pytest.raises(KilledError):
        train(LONGER, kill_at(len(before) - 1))
    run = only_run()
    lines = run.metrics_path.read_text().splitlines()
    assert len(lines) == sum(isinstance(event, StepEvent | EvaluationEvent) for event in before)
    is_over = len(before) == len(events)
    assert stop_reason(run) == ("max_steps" if is_over else None)
    saved = {event.name: event.step for event in before if isinstance(event, CheckpointEvent)}
    started = next(event for event in resume(run).events if isinstance(event, StartEvent))
    # A save that is also the best reports best first.
    assert started.step == max(saved.values(), default=0)
    assert_exact(run)


def test_killed_after_its_last_save(monkeypatch: pytest.MonkeyPatch, trained_once: TrainedOnce) -> None:
    update, last = Run.update, CheckpointEvent(NUM_STEPS, "latest")
    with monkeypatch.context() as patch:
        # The record of the last save, and everything after it, is lost.
        patch.setattr(Run, "update", lambda run, **fields: fields.get("step") == last.step or update(run, **fields))
        with pytest.raises(KilledError):
            train(LONGER, lambda event: kill_at(0)(event) if event == last else None)
    run = only_run()
    run.update(status="running")
    assert (run.status, run.record.step) == ("crashed", 6)
    resume(run)
    assert_exact(run)
    whole = trained_once(LONGER)
    recorded = ("status", "step", "epoch", "tokens", "best_loss", "best_step", "stop_reason", "skipped_steps")
    assert [getattr(run.record, name) for name in recorded] == [getattr(whole.record, name) for name in recorded]


@pytest.mark.parametrize(
    ("damaged", "missing", "source"),
    [
        (["latest"], [], "previous"),
        (["latest"], ["previous"], "best"),
        ([], ["latest", "previous"], "best"),
    ],
)
def test_a_lost_checkpoint_costs_some_steps_and_nothing_else(
    trained_once: TrainedOnce, damaged: list[str], missing: list[str], source: str
) -> None:
    run = trained_once(LONGER, stop=7)
    for name in damaged:
        damage(run, name)
    remove_pointers(run, *missing)
    resumed = resume(run)
    assert [warning.partition("resuming from ")[2] for warning in resumed.warnings] == [f"{source} (step 6)"]
    assert [event.step for event in resumed.events[:2]] == [6, 6]
    assert_exact(run)


def test_a_finished_run_stays_as_it_is(trained_once: TrainedOnce) -> None:
    run = trained_once(LONGER)
    assert stop_reason(run) == "max_steps"
    again = resume(run)
    assert (again.end, again.result.evaluation) == ((NUM_STEPS, "max_steps"), None)
    assert run.record.status == "finished"
    assert_exact(run)


def test_leftovers_of_a_killed_process_are_removed(interrupted: Run) -> None:
    run = interrupted
    leftovers = [run.path / ".run.json.0a1b2c3d.tmp", run.checkpoints_dir / ".pointers.0a1b2c3d.tmp"]
    for leftover in leftovers:
        leftover.write_bytes(b"half a file")
    half = run.checkpoints_dir / ".step-00000009.0a1b2c3d.tmp"
    half.mkdir()
    (half / "a.safetensors").write_bytes(b"half a shard")
    resume(run)
    assert not half.exists()
    assert not any(leftover.exists() for leftover in leftovers)


# Device and precision


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that a new run would take."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


@pytest.fixture
def cpu_run(monkeypatch: pytest.MonkeyPatch, trained_once: TrainedOnce) -> Run:
    """A run that took the CPU, because there was nothing else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return trained_once(AUTO, stop=3)


@pytest.mark.parametrize(
    ("recorded", "overrides", "device", "precision"),
    [
        ({}, [], "cpu", torch.float32),
        ({"device": "cuda:0"}, [], "cuda", torch.float32),
        ({"device": "cuda:1"}, [], "cuda", torch.float32),  # another GPU keeps the precision
        ({"device": "cuda:1"}, ["training.device=cuda:0"], "cuda", torch.float32),
        ({"device": "cuda:1"}, ["training.device=cpu", "training.precision=bfloat16"], "cpu", torch.bfloat16),
    ],
)
def test_device_and_precision_are_those_it_was_trained_with(
    cpu_run: Run,
    gpu: None,
    recorded: dict[str, str],
    overrides: list[str],
    device: str,
    precision: torch.dtype,
) -> None:
    new = set_up(AUTO)
    assert (new.device.type, new.precision) == ("cuda", torch.bfloat16)
    cpu_run.update(**recorded)
    resumed = set_up_resume(cpu_run, settings=dict(map(parse_override, overrides)))
    assert (resumed.device.type, resumed.precision) == (device, precision)
    assert overrides or resumed.config == AUTO, "checkpoints keep the config that was given"


def test_a_missing_device_is_replaced_with_a_warning(cpu_run: Run) -> None:
    # As if it had been trained on a GPU so far, whose generator is in the checkpoint too.
    cpu_run.update(device="cuda:1", precision="bfloat16")
    manager = CheckpointManager()
    checkpoint = manager.load(cpu_run, "latest")
    rng = checkpoint.rng | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    manager.save(cpu_run, "latest", replace(checkpoint, rng=rng))
    resumed = resume(cpu_run)
    record = cpu_run.record
    assert (resumed.state.step, record.device, record.precision) == (6, "cpu", "float32")
    assert resumed.warnings == record.resumes[0]["warnings"]
    assert resumed.warnings[0].startswith("device: cuda:1 -> cpu, precision: bfloat16 -> float32: ")
    # The next resume is on the device that this one took.
    assert set_up_resume(cpu_run).device.type == "cpu"
    with pytest.raises(LumiereError, match="'cuda'"):
        set_up_resume(cpu_run, settings={"training.device": "cuda"})


# Another corpus, another tokenizer


def test_another_corpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Path("book.txt")
    book.write_text("Zorbunika sang. Then Zorbunika slept. " * 40)
    changes = {"dataset.name": "text", "dataset.data_files": "book.txt", "dataset.num_documents": None}
    run = train(short(changes), stop_at(3)).run
    text = book.read_text()
    book.write_text(text.replace("slept", "leapt"))
    # The cache has the corpus as it was; without it, the changed file is no substitute.
    assert set_up_resume(run).corpus.fingerprint == run.record.corpus_sha256
    with monkeypatch.context() as patch:
        patch.setenv("LUMIERE_CACHE_DIR", str(tmp_path / "empty"))
        with pytest.raises(LumiereError, match="data_sha256"):
            set_up_resume(run)
    assert run.record.status == "interrupted"
    book.write_text(text)
    assert resume(run).state.step == 6


def test_another_tokenizer_is_refused(interrupted: Run) -> None:
    text = interrupted.tokenizer_path.read_text()
    # As another version of tokenizers might have merged.
    tokenizer = json.loads(text)
    tokenizer["model"]["merges"][-2:] = reversed(tokenizer["model"]["merges"][-2:])
    interrupted.tokenizer_path.write_text(json.dumps(tokenizer))
    with pytest.raises(LumiereError, match="the tokenizer of 'stories'"):
        set_up_resume(interrupted)
    interrupted.tokenizer_path.write_text(text)
    assert resume(interrupted).state.step == 6
