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
from lumiere.training.schedule import learning_rate_factor
from lumiere.training.setup import CHANGEABLE, check_schedule, set_up_resume
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


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_has_decayed_keeps_its_length(schedule: str) -> None:
    run = train(short(**CONSTANT | {"schedule": schedule})).run
    before, config = hashes(run), run.config_path.read_text()
    with pytest.raises(ConfigError, match=f"the {schedule} schedule of 10 steps .* 15 at step 10") as caught:
        resume(run, overrides=["training.max_epochs=3"])
    assert "training.schedule=constant" in (caught.value.hint or "")
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


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.dropout", 0.3),
        ("tokenizer.min_frequency", 3),
        ("dataset.num_documents", 2),
        ("training.batch_size", 6),
        ("training.learning_rate", 1e-3),
        ("training.seed", 5),
        ("training.ema_decay", 0.9),
        ("training.schedule", "linear"),
    ],
)
def test_what_a_step_computes_cannot_change(path: str, value: Any) -> None:
    run = train(short(), stop_at(3)).run
    refused = f"was trained with {path} .* which a resume cannot change"
    with pytest.raises(ConfigError, match=refused) as caught:
        set_up_resume(run, overrides=[f"{path}={value}"])
    assert ", ".join(CHANGEABLE) in (caught.value.hint or "")
    # The same in an editor.
    run.config_path.write_text(dump_config(changed_config(run.load_config().model_dump(), [(path, value)])))
    with pytest.raises(ConfigError, match=refused):
        set_up_resume(run)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("training.precision=bfloat16", "precision: float32 -> bfloat16"),
        ("training.gradient_accumulation_steps=2", "training.gradient_accumulation_steps: 1 -> 2"),
        ("training.compile=true", "training.compile: False -> True"),
    ],
)
def test_how_a_step_is_computed_may_change_and_the_bits_with_it(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, override: str, change: str
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    config = short({"model.dropout": 0.0}, optimizer=optimizer)
    whole = train(config, runs_dir="whole")
    run = train(config, stop_at(3)).run
    resumed = resume(run, overrides=[override])
    assert (resumed.state.step, run.record.status) == (6, "finished")
    (entry,) = run.record.resumes
    (warning,) = entry["warnings"]
    assert warning.startswith(change)
    assert run.load_config() != config
    assert compiled or not torch.equal(resumed.weights, whole.weights), "it took effect"
    torch.testing.assert_close(resumed.weights, whole.weights, rtol=0, atol=0.02)


def test_activation_checkpointing_may_change_and_no_bit_with_it() -> None:
    whole, run = train(short(), runs_dir="whole").run, train(short(), stop_at(3)).run
    resume(run, overrides=["training.activation_checkpointing=true"])
    assert run.record.resumes[0]["warnings"] == []
    assert run.load_config().training.activation_checkpointing
    assert hashes(run) == hashes(whole)


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


def test_a_run_that_another_machine_trains_is_left_alone() -> None:
    run = train(short(), stop_at(3)).run
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
