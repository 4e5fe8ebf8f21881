"""Resuming is exact: however and wherever a training stops, going on gives the bits of never having stopped."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lumiere.errors import LumiereError
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.events import (
    Callback,
    CheckpointEvent,
    EvaluationEvent,
    Event,
    StartEvent,
    StepEvent,
    WarningEvent,
)
from lumiere.training.run import resume, start, stop_reason
from lumiere.training.setup import set_up, set_up_resume
from lumiere.training.state import COUNTERS
from lumiere.training.trainer import TrainingResult

NUM_STEPS = 12
LONGER = {
    "training.max_steps": NUM_STEPS,
    "training.eval_interval": 3,
    "training.checkpoint_interval": 4,
    "training.ema_decay": 0.5,
}
BOOK = {"dataset.name": "text", "dataset.data_files": "book.txt", "dataset.num_documents": None}


class KilledError(Exception):
    """Stands for a sudden death: nothing is saved on the way out."""


def stop_at(step: int) -> Callback:
    """Ctrl-C during a step."""

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            signal.raise_signal(signal.SIGINT)

    return listen


def kill_at(number: int) -> Callback:
    """Sudden death when the event of this number is told."""
    told = 0

    def listen(event: Event) -> None:
        nonlocal told
        if told == number:
            raise KilledError(str(event))
        told += 1

    return listen


def go_on(run: Run, *callbacks: Callback) -> TrainingResult:
    return resume(set_up_resume(run), run, callbacks)


@pytest.fixture(scope="session")
def outcome(tensor_hashes):
    """All that a training leaves behind, but for what depends on the clock."""

    def leaves(run: Run) -> dict[str, Any]:
        manager = CheckpointManager(run.path.parent)
        names = [name for name in manager.names(run) if name != "previous"]
        saved = {name: manager.load(run, name, groups=()).metadata for name in ("best", "latest")}
        lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
        return {
            "tensors": {name: tensor_hashes(run, name) for name in names},
            "counters": {
                name: {key: metadata[key] for key in COUNTERS if key != "seconds"} for name, metadata in saved.items()
            },
            "metrics": [
                {key: value for key, value in line.items() if key not in ("time", "tokens_per_second", "mfu")}
                for line in lines
            ],
        }

    return leaves


@pytest.fixture(scope="module")
def straight(
    configure, outcome, tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path
) -> tuple[dict[str, Any], list[Event]]:
    """A training that never stopped: what it left, and what it told."""
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMIERE_CACHE_DIR", str(corpus_cache))
        store = RunStore(tmp_path_factory.mktemp("straight") / "runs")
        return outcome(start(set_up(configure(LONGER)), store, callbacks=[events.append]).run), events


def test_the_straight_training_is_worth_comparing_with(straight) -> None:
    left, events = straight
    assert [line["step"] for line in left["metrics"] if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert [line["step"] for line in left["metrics"] if "val_loss" in line] == [3, 5, 6, 9, 10, 12]
    assert {name.partition(".")[0] for name in left["tensors"]["latest"]} == {"model", "optimizer", "rng"}
    assert left["counters"]["latest"]["stop_reason"] == "max_steps"
    assert len(events) == 1 + 12 + 6 + sum(isinstance(event, CheckpointEvent) for event in events)


@pytest.mark.parametrize("step", range(1, NUM_STEPS))
def test_interrupted_at_any_step(configure, launch, outcome, straight, step: int) -> None:
    first = launch(configure(LONGER), [stop_at(step)])
    run = first.run
    assert (first.state.step, first.signal_number) == (step, signal.SIGINT)
    assert run.record.status == "interrupted"
    assert stop_reason(run) is None
    events: list[Event] = []
    second = go_on(run, events.append)
    assert isinstance(events[0], StartEvent)
    assert [events[0].step, *(event.step for event in events if isinstance(event, StepEvent))] == [
        *range(step, NUM_STEPS + 1)
    ]
    assert second.state.seconds > first.state.seconds
    assert (run.record.status, run.record.stop_reason) == ("finished", "max_steps")
    assert outcome(run) == straight[0]


FORTY = LONGER | {"training.max_steps": 40, "training.optimizer": "muon", "training.random_window_offset": True}


@pytest.fixture(scope="module")
def straight_forty(configure, outcome, tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMIERE_CACHE_DIR", str(corpus_cache))
        return outcome(start(set_up(configure(FORTY)), RunStore(tmp_path_factory.mktemp("forty") / "runs")).run)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 40))
def test_interrupted_at_any_of_forty_steps(configure, launch, outcome, straight_forty, step: int) -> None:
    """With all that a state can hold: Muon's momenta, AdamW's averages, the average of the weights, eight epochs."""
    run = launch(configure(FORTY), [stop_at(step)]).run
    assert go_on(run).state.step == 40
    assert outcome(run) == straight_forty


def test_interrupted_again_and_again(configure, launch, outcome, straight) -> None:
    run = launch(configure(LONGER), [stop_at(1)]).run
    for step in (2, 3, 7, 11):
        assert go_on(run, stop_at(step)).state.step == step
    go_on(run)
    assert outcome(run) == straight[0]


# The start, the last step before anything is saved, the first evaluation, everything from the save of step 4, which has
# a snapshot, to the step after the first epoch, and the very end.
KILLS = [0, 3, 4, *range(8, 14), -1]


@pytest.mark.parametrize("number", KILLS)
def test_killed_at_any_event(configure, launch, outcome, straight, tmp_path: Path, number: int) -> None:
    left, events = straight
    number %= len(events)
    with pytest.raises(KilledError):
        launch(configure(LONGER), [kill_at(number)])
    (run,) = RunStore(tmp_path / "runs").all()
    told = run.metrics_path.read_text().splitlines()
    assert len(told) == sum(isinstance(event, StepEvent | EvaluationEvent) for event in events[: number + 1])
    go_on(run)
    assert outcome(run) == left


def test_killed_before_the_first_save_it_starts_at_step_0(configure, launch, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        launch(configure(LONGER), [kill_at(2)])
    (run,) = RunStore(tmp_path / "runs").all()
    assert "latest" not in CheckpointManager().names(run)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2]
    assert stop_reason(run) is None
    events: list[Event] = []
    go_on(run, events.append)
    assert events[0].step == 0


def test_a_damaged_checkpoint_costs_some_steps_and_nothing_else(configure, launch, outcome, straight) -> None:
    run = launch(configure(LONGER), [stop_at(8)]).run
    latest = run.checkpoints_dir / "latest.safetensors"
    data = latest.read_bytes()
    latest.unlink()
    latest.write_bytes(data[:-1])
    events: list[Event] = []
    go_on(run, events.append)
    warning, begun = events[:2]
    assert isinstance(warning, WarningEvent)
    assert "the latest checkpoint is damaged" in warning.message
    assert isinstance(begun, StartEvent)
    assert (warning.step, begun.step) == (6, 6)
    assert outcome(run) == straight[0]


@pytest.mark.slow
def test_killed_by_the_system(configure, outcome, straight, tmp_path: Path) -> None:
    """SIGKILL to a process of its own, which no handler and no `finally` survives."""
    program = """
import os, signal, sys
from pathlib import Path
from lumiere.config.loader import load_config_file
from lumiere.persistence.runs import RunStore
from lumiere.training.run import start
from lumiere.training.setup import set_up
from lumiere.training.events import StepEvent
import torch
torch.set_num_threads(1)
def listen(event):
    if isinstance(event, StepEvent) and event.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
start(set_up(load_config_file(Path("config.yaml"))), RunStore(), callbacks=[listen])
"""
    (tmp_path / "config.yaml").write_text(json.dumps(configure(LONGER).model_dump()))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    (run,) = RunStore(tmp_path / "runs").all()
    assert run.record.status == "running"
    go_on(run)
    assert outcome(run) == straight[0]


def test_without_the_random_numbers_state_it_would_not_be_exact(
    configure, launch, outcome, straight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of the tests above: dropout is on, and they would see it."""
    run = launch(configure(LONGER), [stop_at(7)]).run
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    go_on(run)
    different, exact = outcome(run), straight[0]
    assert different["tensors"]["latest"] != exact["tensors"]["latest"]
    assert different["tensors"]["step-00000004"] == exact["tensors"]["step-00000004"]


def test_muon_too(configure, launch, outcome) -> None:
    config = configure(LONGER | {"training.optimizer": "muon"})
    never_stopped = launch(config).run
    run = launch(config, [stop_at(4)]).run
    go_on(run)
    assert outcome(run) == outcome(never_stopped)


def test_early_stopping_goes_on_counting(configure, launch, outcome) -> None:
    # No epoch improves by 100 nats: the first one is noted, and the two after it exhaust the patience.
    changes = {"max_steps": None, "max_epochs": 9, "patience": 2, "stopping_threshold": 100.0}
    config = configure({f"training.{name}": value for name, value in changes.items()})
    never_stopped = launch(config)
    assert (never_stopped.state.step, never_stopped.state.stop_reason) == (15, "patience")
    first = launch(config, [stop_at(11)])
    assert first.state.epochs_without_improvement == 1
    second = go_on(first.run)
    assert (second.state.step, second.state.stop_reason) == (15, "patience")
    assert outcome(first.run) == outcome(never_stopped.run)


def test_a_finished_run_says_why_and_stays_as_it_is(configure, launch, outcome, straight) -> None:
    run = launch(configure(LONGER)).run
    assert stop_reason(run) == "max_steps"
    again = go_on(run)
    assert (again.state.step, again.state.stop_reason, again.evaluation) == (NUM_STEPS, "max_steps", None)
    assert run.record.status == "finished"
    assert outcome(run) == straight[0]


def test_killed_after_its_last_save_it_is_brought_to_its_end(
    configure, launch, outcome, straight, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = launch(configure(LONGER)).run
    update, last = Run.update, CheckpointEvent(NUM_STEPS, "latest")
    with monkeypatch.context() as patch:
        # The record of the last save, and all that comes after it, is lost.
        patch.setattr(Run, "update", lambda run, **fields: fields.get("step") == last.step or update(run, **fields))
        with pytest.raises(KilledError):
            launch(configure(LONGER), [lambda event: kill_at(0)(event) if event == last else None])
    run = next(run for run in RunStore().all() if run != whole)
    run.update(status="running")
    assert (run.status, run.record.step) == ("crashed", 10)
    go_on(run)
    assert outcome(run) == straight[0]
    told = ("status", "step", "epoch", "tokens", "best_loss", "best_step", "stop_reason", "skipped_steps")
    assert {name: getattr(run.record, name) for name in told} == {name: getattr(whole.record, name) for name in told}


def test_device_and_precision_are_those_it_was_trained_with(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure({"training.device": "auto", "training.precision": "auto"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = launch(config, [stop_at(3)]).run
    # Now the machine has a GPU, which a new run would take.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    fresh, resumed = set_up(config), set_up_resume(run)
    assert (str(fresh.device), fresh.precision) == ("cuda", torch.bfloat16)
    assert (str(resumed.device), resumed.precision) == ("cpu", torch.float32)
    assert resumed.config == config, "the checkpoints keep the config that was given"


def test_a_device_that_is_gone_is_no_dead_end(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = launch(configure({"training.device": "auto", "training.precision": "auto"}), [stop_at(3)]).run
    # As if it had been trained on a GPU so far, whose random numbers the checkpoint has too.
    run.update(device="cuda:1", precision="bfloat16")
    checkpoint = CheckpointManager().load(run, "latest")
    on_gpu = replace(checkpoint, rng=checkpoint.rng | {"cuda": torch.zeros(16, dtype=torch.uint8)})
    CheckpointManager().save(run, "latest", on_gpu)
    warnings: list[str] = []
    setup = set_up_resume(run)
    assert (str(setup.device), setup.precision) == ("cpu", torch.float32)
    result = resume(
        setup, run, [lambda event: warnings.append(event.message) if isinstance(event, WarningEvent) else None]
    )
    assert (result.state.step, run.record.device, run.record.precision) == (6, "cpu", "float32")
    assert warnings == run.record.resumes[0]["warnings"]
    (warning,) = warnings
    assert "device: cuda:1 -> cpu" in warning
    assert "precision: bfloat16 -> float32" in warning
    # The next resume is on the device that it took in between.
    assert set_up_resume(run).device.type == "cpu"
    with pytest.raises(LumiereError, match="no device 'cuda'"):
        set_up_resume(run, overrides=["training.device=cuda"])


def test_another_gpu_keeps_the_precision(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    run = launch(configure({"training.device": "auto", "training.precision": "auto"}), [stop_at(3)]).run
    run.update(device="cuda:1", precision="float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for overrides in ([], ["training.device=cuda:0"], ["training.device=cuda"]):
        resumed = set_up_resume(run, overrides=overrides)
        assert (resumed.device.type, resumed.precision) == ("cuda", torch.float32)
    asked = set_up_resume(run, overrides=["training.device=cpu", "training.precision=bfloat16"])
    assert (str(asked.device), asked.precision) == ("cpu", torch.bfloat16)


def test_another_corpus_is_refused(configure, launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Path("book.txt")
    book.write_text("Zorbunika sang. Then Zorbunika slept. " * 40)
    run = launch(configure(BOOK), [stop_at(3)]).run
    text = book.read_text()
    book.write_text(text.replace("slept", "leapt"))
    # In the cache is the corpus as it was; without it, the changed file is no substitute.
    assert set_up_resume(run).corpus.fingerprint == run.record.corpus_sha256
    with monkeypatch.context() as patch:
        patch.setenv("LUMIERE_CACHE_DIR", str(tmp_path / "empty"))
        with pytest.raises(LumiereError, match="data_sha256"):
            set_up_resume(run)
    assert run.record.status == "interrupted"
    book.write_text(text)
    assert go_on(run).state.step == 6


def test_another_tokenizer_is_refused(configure, launch) -> None:
    run = launch(configure({}), [stop_at(3)]).run
    text = run.tokenizer_path.read_text()
    # As another version of tokenizers might have merged.
    tokenizer = json.loads(text)
    tokenizer["model"]["merges"][-2:] = reversed(tokenizer["model"]["merges"][-2:])
    run.tokenizer_path.write_text(json.dumps(tokenizer))
    with pytest.raises(LumiereError, match=f"the tokenizer of 'stories' is not the one that run {run.id}"):
        set_up_resume(run)
    run.tokenizer_path.write_text(text)
    assert go_on(run).state.step == 6


def test_where_latest_and_the_one_before_are_damaged_best_is_gone_on_from(configure, launch, outcome, straight) -> None:
    run = launch(configure(LONGER), [stop_at(8)]).run
    best = CheckpointManager().load(run, "best", groups=()).metadata["step"]
    for name in ("latest", "previous"):
        (run.checkpoints_dir / f"{name}.safetensors").write_bytes(b"damaged")
    events: list[Event] = []
    go_on(run, events.append)
    assert isinstance(events[0], WarningEvent)
    assert events[0].message.endswith(f"best (step {best})")
    assert outcome(run) == straight[0]


def test_where_latest_was_not_saved_yet_it_is_not_called_damaged(configure, launch) -> None:
    run = launch(configure({})).run
    for name in ("latest", "previous"):
        (run.checkpoints_dir / f"{name}.safetensors").unlink(missing_ok=True)
    events: list[Event] = []
    go_on(run, events.append)
    assert isinstance(events[0], WarningEvent)
    assert events[0].message.startswith("there is no latest checkpoint")


def test_what_a_killed_process_left_behind_goes(configure, launch) -> None:
    run = launch(configure({}), [stop_at(3)]).run
    leftovers = [run.path / ".run.json.0a1b2c3d.tmp", run.checkpoints_dir / ".latest.safetensors.0a1b2c3d.tmp"]
    for leftover in leftovers:
        leftover.write_bytes(b"half a file")
    half = run.checkpoints_dir / ".latest.0a1b2c3d.tmp"
    half.mkdir()
    (half / "a.safetensors").write_bytes(b"half a shard")
    go_on(run)
    assert not half.exists()
    assert not any(leftover.exists() for leftover in leftovers)
