"""Going on with other settings: what may change, what may not, and that a longer run is as if it had been meant so."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere import files as lock_module
from lumiere.config.loader import dump_config, validate
from lumiere.config.schema import TrainingConfig
from lumiere.distributed import ProcessGroup
from lumiere.errors import ConfigError, RunBusyError
from lumiere.files import locked
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.events import Event, StepEvent
from lumiere.training.run import resume
from lumiere.training.schedule import learning_rate_factor
from lumiere.training.setup import CHANGEABLE, check_schedule, set_up_resume
from lumiere.training.trainer import TrainingResult

CONSTANT = {"training.schedule": "constant", "training.max_steps": None, "training.max_epochs": 2}


def go_on(run: Run, *overrides: str) -> TrainingResult:
    return resume(set_up_resume(run, overrides=overrides), run)


def test_a_longer_run_has_the_weights_of_one_that_was_meant_so(configure, launch, tensor_hashes) -> None:
    meant = launch(configure(CONSTANT | {"training.max_epochs": 4})).run
    run = launch(configure(CONSTANT)).run
    assert run.record.stop_reason == "max_epochs"
    result = go_on(run, "training.max_epochs=3", "training.max_epochs=4", "training.eval_interval=3")
    assert (result.state.step, result.state.stop_reason) == (20, "max_epochs")
    assert tensor_hashes(run, "latest") == tensor_hashes(meant, "latest")
    assert (run.load_config().training.max_epochs, run.load_config().training.eval_interval) == (4, 3)
    (first,) = run.record.resumes
    assert first["step"] == 10
    assert first["changed"] == ["training.max_epochs: 2 -> 4", "training.eval_interval: empty -> 3"]


def test_more_patience_goes_on_after_an_early_stop(configure, launch, tensor_hashes) -> None:
    impatient = {"max_steps": None, "max_epochs": 9, "patience": 1, "stopping_threshold": 100.0}
    config = configure({f"training.{name}": value for name, value in impatient.items()})
    run = launch(config).run
    assert (run.record.stop_reason, run.record.step) == ("patience", 10)
    # The cosine of nine epochs stays that of nine epochs.
    assert go_on(run, "training.patience=2").state.step == 15
    patient = launch(config.model_copy(update={"training": config.training.model_copy(update={"patience": 2})})).run
    assert tensor_hashes(run, "latest") == tensor_hashes(patient, "latest")
    # As it is, it is over; nothing is trained, and nothing is lost.
    assert (go_on(run).state.step, run.record.status) == (15, "finished")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_fell_keeps_its_length(configure, launch, tensor_hashes, schedule: str) -> None:
    run = launch(configure(CONSTANT | {"training.schedule": schedule, "training.warmup_steps": 1})).run
    before, config = tensor_hashes(run, "latest"), run.config_path.read_text()
    with pytest.raises(ConfigError, match=f"the {schedule} schedule of 10 steps cannot become one of 15") as caught:
        go_on(run, "training.max_epochs=3")
    assert "schedule=constant" in (caught.value.hint or "")
    assert (tensor_hashes(run, "latest"), run.config_path.read_text()) == (before, config)
    assert (run.record.status, run.record.resumes) == ("finished", ())


def test_a_schedule_is_lengthened_before_it_falls(configure, launch, tensor_hashes, stop_at) -> None:
    falling = {"training.schedule": "linear", "training.decay_fraction": 0.3, "training.warmup_steps": 1}
    meant = launch(configure(CONSTANT | falling | {"training.max_epochs": 4})).run
    run = launch(configure(CONSTANT | falling), [stop_at(5)]).run
    assert go_on(run, "training.max_epochs=4").state.step == 20
    assert tensor_hashes(run, "latest") == tensor_hashes(meant, "latest")


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    decay_fraction=st.sampled_from([0.1, 0.5, 1.0]),
    warmup_steps=st.integers(0, 12),
    lengths=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    step=st.integers(0, 25),
)
def test_a_length_is_refused_where_a_past_rate_would_differ(
    schedule: Any, decay_fraction: float, warmup_steps: int, lengths: tuple[int, int], step: int
) -> None:
    """By looking at every step, where `check_schedule` looks at the last one."""
    old, new = lengths
    step = min(step, old)
    values = {"schedule": schedule, "decay_fraction": decay_fraction, "warmup_steps": warmup_steps}
    before, after = (TrainingConfig(max_steps=length, **values) for length in lengths)
    # There are no rates beyond the end, but for one that is always the same once it is at its peak.
    is_same = schedule == "constant" or (
        step <= new
        and all(
            learning_rate_factor(s, old, before) == learning_rate_factor(s, new, before) for s in range(1, step + 1)
        )
    )
    try:
        check_schedule(before, after, epoch_steps=7, step=step)
    except ConfigError:
        assert not is_same
    else:
        assert is_same


OTHER = {
    "model.dropout": 0.3,
    "tokenizer.min_frequency": 3,
    "dataset.num_documents": 2,
    "training.batch_size": 6,
    "training.learning_rate": 1e-3,
    "training.seed": 5,
    "training.ema_decay": 0.9,
    "training.schedule": "linear",
}


@pytest.mark.parametrize("path", OTHER)
def test_what_a_step_computes_does_not_change_on_the_way(configure, launch, stop_at, path: str) -> None:
    run = launch(configure({}), [stop_at(3)]).run
    with pytest.raises(ConfigError, match=f"was trained with {path} .* which a resume cannot change") as caught:
        set_up_resume(run, overrides=[f"{path}={OTHER[path]}"])
    assert ", ".join(CHANGEABLE) in (caught.value.hint or "")
    # The same by an editor.
    section, name = path.split(".")
    values = run.load_config().model_dump()
    values[section][name] = OTHER[path]
    run.config_path.write_text(dump_config(validate(values)))
    with pytest.raises(ConfigError, match=f"was trained with {path} .* which a resume cannot change"):
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
    configure, launch, stop_at, monkeypatch: pytest.MonkeyPatch, optimizer: str, override: str, change: str
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    config = configure({"model.dropout": 0.0, "training.optimizer": optimizer})
    straight = launch(config).state
    run = launch(config, [stop_at(3)]).run
    result = go_on(run, override)
    assert (result.state.step, run.record.status) == (6, "finished")
    (entry,) = run.record.resumes
    (warning,) = entry["warnings"]
    assert warning.startswith(change)
    assert run.load_config() != config
    weights, expected = result.state.model.state_dict(), straight.model.state_dict()
    assert compiled or any((weights[name] != expected[name]).any() for name in expected), "it took effect"
    assert all(torch.allclose(weights[name], expected[name], atol=0.02) for name in expected)


def test_activation_checkpointing_may_change_and_no_bit_with_it(configure, launch, stop_at, tensor_hashes) -> None:
    config = configure({})
    straight = launch(config).run
    run = launch(config, [stop_at(3)]).run
    go_on(run, "training.activation_checkpointing=true")
    assert run.record.resumes[0]["warnings"] == []
    assert run.load_config().training.activation_checkpointing
    assert tensor_hashes(run, "latest") == tensor_hashes(straight, "latest")


def test_a_setting_that_is_misspelt_is_refused_as_ever(configure, launch, stop_at) -> None:
    run = launch(configure({}), [stop_at(3)]).run
    with pytest.raises(ConfigError, match=r"unknown key training\.epochs"):
        set_up_resume(run, overrides=["training.epochs=5"])


def test_two_trainings_never_write_to_one_run(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "PATIENCE", 0.01)
    refused = []

    def second(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 2:
            run = RunStore().all()[0]
            assert run.status == "running"
            with pytest.raises(RunBusyError):
                resume(set_up_resume(run), run)
            refused.append(run.metrics_path.read_bytes())

    run = launch(configure({}), [second]).run
    assert len(refused) == 1
    assert run.metrics_path.read_bytes().startswith(refused[0]), "the one that was refused cut nothing off"
    assert run.record.status == "finished"
    with locked(run.path):
        pass


def test_a_run_that_another_machine_trains_is_left_alone(configure, launch, stop_at) -> None:
    run = launch(configure({}), [stop_at(3)]).run
    run.update(status="running", host="node7", pid=4242, boot_id="another", job={"id": "7", "agent": None})
    before = run.metrics_path.read_bytes(), run.record_path.read_bytes()
    with pytest.raises(RunBusyError, match="node7"):
        go_on(run)
    assert (run.metrics_path.read_bytes(), run.record_path.read_bytes()) == before
    # What torchrun starts again may find itself on another machine, and the processes before it have ended.
    run.update(job={"token": "7"})
    with pytest.raises(RunBusyError, match="node7"):
        resume(set_up_resume(run), run, processes=ProcessGroup(job="8"))
    assert resume(set_up_resume(run), run, processes=ProcessGroup(job="7")).state.step == 6
