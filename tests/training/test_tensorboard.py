"""TensorBoard's files, read by its own reader."""

import json
from pathlib import Path
from typing import Any

import pytest

from lumiere.config.loader import dump_config
from lumiere.persistence.metrics import read_metrics
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.events import Event, WarningEvent
from lumiere.training.run import resume
from lumiere.training.setup import set_up_resume

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="the package tensorboard is not installed"
)
plugin_data_pb2 = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")

LOGGED = {"training.loggers": ["tensorboard"], "training.max_steps": 6, "training.eval_interval": 3}
TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "mfu": "train/mfu",
    "val_loss": "val/loss",
    "val_perplexity": "val/perplexity",
    "val_bits_per_byte": "val/bits_per_byte",
}


def read(run: Run) -> Any:
    """All that TensorBoard would show of a run."""
    reader = event_accumulator.EventAccumulator(str(run.path / "tensorboard"))
    return reader.Reload()


def curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    reader = read(run)
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def expected(run: Run) -> dict[str, list[tuple[int, Any]]]:
    """The same curves, by `metrics.jsonl`. Rounded there, and float32 here."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for line in read_metrics(run.metrics_path):
        for key, tag in TAGS.items():
            if key in line:
                found.setdefault(tag, []).append((line["step"], pytest.approx(line[key], rel=1e-3, abs=1e-4)))
    return found


def test_the_curves_are_those_of_the_metrics(configure, launch) -> None:
    run = launch(configure(LOGGED)).run
    assert set(expected(run)) == set(TAGS.values())
    assert curves(run) == expected(run)
    assert [step for step, _ in curves(run)["val/loss"]] == [3, 5, 6]


def test_the_config_and_the_hyperparameters_are_there(configure, launch) -> None:
    config = configure(LOGGED)
    reader = read(launch(config).run)
    (text,) = reader.Tensors("config/text_summary")
    assert dump_config(config) in text.tensor_proto.string_val[0].decode()
    (start,) = [
        data for tag, data in reader.PluginTagToContent("hparams").items() if tag == "_hparams_/session_start_info"
    ]
    hparams = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert hparams["training.learning_rate"].number_value == config.training.learning_rate
    assert hparams["model.positions"].string_value == "learned"
    assert hparams["training.compile"].bool_value is False
    assert "training.muon_weight_decay" not in hparams


def test_a_resume_doubles_no_step(configure, launch) -> None:
    def kill_at_five(event: Event) -> None:
        # Step 5 is told already, and the newest checkpoint is that of step 3.
        if type(event).__name__ == "StepEvent" and event.step == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        launch(configure(LOGGED | {"training.eval_interval": None, "training.checkpoint_interval": 3}), [kill_at_five])
    run = RunStore(Path("runs")).open("latest")
    before = [step for step, _ in curves(run)["train/loss"]]
    assert before[-1] == 4
    warnings: list[Event] = []
    resume(set_up_resume(run), run, [lambda event: warnings.append(event) if isinstance(event, WarningEvent) else None])
    assert warnings == []
    assert len(list((run.path / "tensorboard").iterdir())) == 2
    assert [step for step, _ in curves(run)["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert curves(run) == expected(run)
    assert len(read(run).Tensors("config/text_summary")) == 1


def test_a_run_that_was_killed_before_its_first_save_begins_anew(configure, launch) -> None:
    def kill_at_two(event: Event) -> None:
        if type(event).__name__ == "StepEvent" and event.step == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        launch(configure(LOGGED), [kill_at_two])
    run = RunStore(Path("runs")).open("latest")
    assert [step for step, _ in curves(run)["train/loss"]] == [1]
    resume(set_up_resume(run), run)
    assert curves(run) == expected(run)
    assert len(read(run).Tensors("config/text_summary")) == 1


def test_the_metrics_file_is_the_same_with_and_without(configure, launch) -> None:
    plain, logged = (launch(configure({"training.loggers": names})).run for names in ([], ["tensorboard"]))
    losses = [
        [json.loads(line).get("loss") for line in run.metrics_path.read_text().splitlines()] for run in (plain, logged)
    ]
    assert losses[0] == losses[1]
    assert not (plain.path / "tensorboard").exists()
