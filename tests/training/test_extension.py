"""Resuming with other settings: what may change, what may not, and that an extended run is the longer run."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere import files
from lumiere.config.loader import changed_config, dump_config
from lumiere.config.schema import TrainingConfig
from lumiere.distributed import ProcessGroup
from lumiere.errors import ConfigError, RunBusyError
from lumiere.files import locked
from lumiere.persistence.runs import Run
from lumiere.training.schedule import learning_rate_factor
from lumiere.training.setup import check_schedule, set_up_resume
from tests.training.conftest import TrainedOnce
from tests.training.short import at_step, hashes, only_run, resume, short, stop_at, train

CONSTANT: dict[str, Any] = {"schedule": "constant", "max_steps": None, "max_epochs": 2, "warmup_steps": 1}
FALLING: dict[str, Any] = {"schedule": "linear", "decay_fraction": 0.3}
IMPATIENT: dict[str, Any] = {"max_steps": None, "max_epochs": 9, "stopping_threshold": 100.0, "patience": 1}


@pytest.mark.parametrize(
    ("before", "stopped_at", "after", "end"),
    [
        (CONSTANT, None, {"max_epochs": 4}, (20, "max_epochs")),
        (CONSTANT | FALLING, 5, {"max_epochs": 4}, (20, "max_epochs")),  # before it decays
        (IMPATIENT, None, {"patience": 2}, (15, "patience")),  # a cosine of nine epochs remains one
    ],
)
def test_an_extended_run_has_the_weights_of_the_longer_run(
    before: dict[str, Any], stopped_at: int | None, after: dict[str, Any], end: tuple[int, str]
) -> None:
    whole = train(short(**before | after), runs_dir="whole").run
    run = train(short(**before), *([stop_at(stopped_at)] if stopped_at else [])).run
    step = run.record.step
    ((name, value),) = after.items()
    overrides = [f"training.{name}=3", f"training.{name}={value}", "training.eval_interval=3"]
    assert resume(run, overrides=overrides).end == end
    assert hashes(run) == hashes(whole)
    settings, (entry,) = run.load_config().training, run.record.resumes
    assert (getattr(settings, name), settings.eval_interval) == (value, 3)
    changed = [f"training.{name}: {before[name]} -> {value}", "training.eval_interval: empty -> 3"]
    assert (entry["step"], sorted(entry["changed"])) == (step, sorted(changed))
    # It is over now: nothing more is trained, and nothing is lost.
    assert (resume(run).end, run.record.status) == (end, "finished")


def test_a_schedule_that_has_decayed_keeps_its_length() -> None:
    run = train(short(**CONSTANT | {"schedule": "cosine"})).run
    before, config = hashes(run), run.config_path.read_text()
    with pytest.raises(ConfigError, match=r"10 steps .* 15 at step 10"):
        resume(run, overrides=["training.max_epochs=3"])
    assert (hashes(run), run.config_path.read_text()) == (before, config)
    assert (run.record.status, run.record.resumes) == ("finished", ())


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    decay_fraction=st.sampled_from([0.1, 0.5, 1.0]),
    warmup_steps=st.integers(0, 12),
    lengths=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    step=st.integers(0, 25),
)
def test_a_length_is_refused_if_a_past_rate_would_differ(
    schedule: Any, decay_fraction: float, warmup_steps: int, lengths: tuple[int, int], step: int
) -> None:
    """Checks every step; `check_schedule` only looks at the last one."""
    old, new = lengths
    step = min(step, old)
    before, after = (
        TrainingConfig(max_steps=n, schedule=schedule, decay_fraction=decay_fraction, warmup_steps=warmup_steps)
        for n in lengths
    )
    # There are no rates beyond the end, except for one that stays the same once it is at its peak.
    is_same = schedule == "constant" or (
        step <= new
        and all(learning_rate_factor(s, old, before) == learning_rate_factor(s, new, after) for s in range(1, step + 1))
    )
    try:
        check_schedule(before, after, epoch_steps=7, step=step)
    except ConfigError:
        assert not is_same
    else:
        assert is_same


CHANGES: dict[str, Any] = {
    "model.dropout": 0.3,
    "tokenizer.min_frequency": 3,
    "dataset.num_documents": 2,
    "training.batch_size": 6,
    "training.learning_rate": 1e-3,
    "training.seed": 5,
    "training.ema_decay": 0.9,
    "training.schedule": "linear",
}


@pytest.mark.parametrize("path", CHANGES)
def test_what_a_step_computes_cannot_change(interrupted: Run, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        set_up_resume(interrupted, settings={path: CHANGES[path]})
    # The same in an editor.
    changed = changed_config(interrupted.load_config().model_dump(), [(path, CHANGES[path])])
    interrupted.config_path.write_text(dump_config(changed))
    with pytest.raises(ConfigError, match=path):
        set_up_resume(interrupted)


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("training.precision=bfloat16", "precision: float32 -> bfloat16"),
        ("training.gradient_accumulation_steps=2", "training.gradient_accumulation_steps: 1 -> 2"),
        ("training.compile=true", "training.compile: False -> True"),
        ("training.activation_checkpointing=true", None),
    ],
)
def test_how_a_step_is_computed_may_change_and_the_bits_with_it(
    monkeypatch: pytest.MonkeyPatch, trained_once: TrainedOnce, override: str, change: str | None
) -> None:
    """Not with activation checkpointing, which computes the same twice."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    config = short({"model.dropout": 0.0}, optimizer="muon")
    whole, run = trained_once(config), trained_once(config, stop=3)
    assert resume(run, overrides=[override]).end == (6, "max_steps")
    (entry,) = run.record.resumes
    assert [warning.partition(": the data")[0] for warning in entry["warnings"]] == ([change] if change else [])
    assert run.load_config() != config
    assert (hashes(run) == hashes(whole)) == (change is None or bool(compiled)), "it took effect"
    weights = zip(run.load_model("latest").parameters(), whole.load_model("latest").parameters(), strict=True)
    for found, expected in weights:
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_two_trainings_never_write_to_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.01)
    refused: list[bytes] = []

    def second() -> None:
        run = only_run()
        assert run.status == "running"
        with pytest.raises(RunBusyError):
            resume(run)
        refused.append(run.metrics_path.read_bytes())

    run = train(short(), at_step(2, second)).run
    (before,) = refused
    assert run.metrics_path.read_bytes().startswith(before), "the refused one removed nothing"
    assert run.record.status == "finished"
    with locked(run.path):
        pass


def test_a_run_that_another_machine_trains_is_left_alone(interrupted: Run) -> None:
    run = interrupted
    run.update(status="running", host="node7", pid=4242, boot_id="another", job={"id": "7", "agent": None})
    before = run.metrics_path.read_bytes(), run.record_path.read_bytes()
    with pytest.raises(RunBusyError, match="node7"):
        resume(run)
    assert (run.metrics_path.read_bytes(), run.record_path.read_bytes()) == before
    # What torchrun restarts may be on another machine, and its earlier processes have ended.
    run.update(job={"token": "7"})
    with pytest.raises(RunBusyError, match="node7"):
        resume(run, processes=ProcessGroup(job="8"))
    assert resume(run, processes=ProcessGroup(job="7")).state.step == 6
