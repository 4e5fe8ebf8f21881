"""From a config to a run: nothing is made that cannot be trained, and the run's files say all about it."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import lumiere
from lumiere import device as device_module
from lumiere.config.loader import load_config
from lumiere.config.messages import setting_paths
from lumiere.data.dataset import tokenize_corpus
from lumiere.errors import CheckpointError, DataError, LumiereError
from lumiere.persistence.liveness import HEARTBEAT_NAME
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import run as run_module
from lumiere.training.events import Event, StepEvent
from lumiere.training.run import check_room, resume
from lumiere.training.setup import set_up, set_up_resume


def at_step(step: int, act: Any) -> Any:
    """A callback that does something at a step."""

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            act()

    return listen


def raising(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


# What is refused


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"training.device": "cuda"}, LumiereError, "there is no device 'cuda'"),
        ({"dataset.name": "./nowhere"}, DataError, "there is no dataset folder './nowhere'"),
        ({"dataset.name": "text"}, DataError, "dataset 'text' needs dataset.data_files"),
    ],
)
def test_what_the_user_gets_wrong_makes_no_run(
    configure,
    launch,
    store: RunStore,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    kind: type[LumiereError],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kind, match=re.escape(message)):
        launch(configure(changes))
    assert not store.runs_dir.exists()


def test_a_full_disk_makes_no_run(
    configure, launch, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=100_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(CheckpointError) as caught:
        launch(configure({}))
    assert "0 MB free, the checkpoints need 1 MB" in caught.value.message
    assert "training.snapshots=false" in caught.value.hint
    assert not store.runs_dir.exists()
    assert asked == [tmp_path], "the nearest folder that exists"


def test_room_for_four_checkpoints_and_the_snapshots_is_enough(
    configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = set_up(configure({"model.embedding_size": 1024, "training.max_steps": 5}))
    # best, latest, previous and the one being written: float32 weights and AdamW's two averages of each.
    needed = 4 * 3 * 4 * setup.num_parameters
    # The weights at steps 0, 1, 2 and 4.
    needed += 4 * 4 * setup.num_parameters
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    check_room(tmp_path, setup)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(CheckpointError, match=f"{needed / 1e6:,.0f} MB free, the checkpoints need {needed / 1e6:,.0f}"):
        check_room(tmp_path, setup)


def test_a_runs_directory_that_is_a_file_is_refused(configure, launch, store: RunStore) -> None:
    store.runs_dir.write_text("")
    with pytest.raises(LumiereError, match="no run can be made"):
        launch(configure({}))


# What is written


def test_the_record(configure, launch, store: RunStore) -> None:
    config = configure({})
    corpus = tokenize_corpus(config)
    result = launch(config)
    record = json.loads(result.run.record_path.read_text())
    assert result.run == store.open("latest")
    best = result.state.best_loss
    expected = {
        "name": result.run.name,
        "command": [],
        "device": "cpu",
        "precision": "float32",
        "num_parameters": sum(parameter.numel() for parameter in result.state.model.parameters()),
        "dataset": "stories",
        "corpus_sha256": corpus.fingerprint,
        "total_steps": 6,
        "step": 6,
        "epoch": 6 / 5,
        "tokens": result.state.tokens,
        "training_seconds": result.state.seconds,
        "best_loss": best,
        "best_step": result.state.best_step,
        "skipped_steps": 0,
        "status": "finished",
        "stop_reason": "max_steps",
        "error": None,
        "pid": os.getpid(),
        "peak_flops": 200_000_000_000,
        "world_size": 1,
        "job": None,
    }
    assert {key: record[key] for key in expected} == expected
    others = {"created_at", "versions", "commit", "machine", "host", "boot_id", "splits", "best_evaluation"}
    assert record.keys() - expected.keys() == others
    assert record["versions"].keys() == {
        "lumiere", "python", "torch", "numpy", "tokenizers", "datasets", "safetensors"
    }  # fmt: skip
    assert record["versions"]["lumiere"] == lumiere.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", record["created_at"])


def test_the_command_is_recorded(trained_run: Run) -> None:
    assert trained_run.record.command == ("lumiere", "train")


def test_the_config_is_complete_and_repeats_the_run(configure, launch, tensor_hashes) -> None:
    config = configure({"training.seed": 5})
    run = launch(config).run
    written = yaml.safe_load(run.config_path.read_text())
    assert [f"{section}.{leaf}" for section, values in written.items() for leaf in values] == setting_paths()
    again = load_config(run.config_path)
    assert again == run.load_config() == config
    repeated = launch(again).run
    assert repeated.path != run.path
    assert tensor_hashes(repeated, "latest") == tensor_hashes(run, "latest")
    assert repeated.config_path.read_text() == run.config_path.read_text()


def test_the_tokenizer_is_the_corpus_own(configure, launch) -> None:
    config = configure({})
    run = launch(config).run
    tokenizer = tokenize_corpus(config).tokenizer
    assert run.tokenizer_path.read_text() == tokenizer.to_json()
    assert run.load_tokenizer().encode("Once upon a time") == tokenizer.encode("Once upon a time")


def test_preparing_measures_the_model_and_makes_nothing(configure, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    stages: list[str] = []
    setup = set_up(configure({}), lambda progress: stages.append(progress.stage))
    # 320 tokens and 16 positions; query, key, value and output; gate, up and down; three gains; all of width 16.
    assert setup.num_parameters == 16 * (320 + 16 + 4 * 16 + 3 * 32 + 3)
    assert (str(setup.device), setup.precision) == ("cpu", torch.float32)
    assert "reading the corpus" in stages
    assert set(tmp_path.iterdir()) == before


# What the status says


def test_running_then_finished(configure, launch, store: RunStore) -> None:
    seen: list[RunRecord] = []
    beats: list[bool] = []

    def look() -> None:
        run = store.open("latest")
        seen.append(run.record)
        beats.append((run.path / HEARTBEAT_NAME).exists())

    run = launch(configure({}), [at_step(2, look)]).run
    assert (seen[0].status, seen[0].pid, seen[0].step) == ("running", os.getpid(), 0)
    assert run.record.status == "finished"
    assert (beats, (run.path / HEARTBEAT_NAME).exists()) == ([True], False)


def test_interrupted(configure, launch) -> None:
    run = launch(configure({}), [at_step(2, lambda: signal.raise_signal(signal.SIGINT))]).run
    assert (run.record.status, run.record.stop_reason, run.record.step) == ("interrupted", None, 2)


def test_interrupted_twice_it_leaves_at_once(configure, launch, store: RunStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        launch(configure({}), [at_step(2, raising(KeyboardInterrupt()))])
    run = store.open("latest")
    assert run.record.status == "interrupted"
    assert not (run.checkpoints_dir / "latest.safetensors").exists()


def test_failed_with_the_errors_text_and_its_class(configure, launch, store: RunStore) -> None:
    error = ZeroDivisionError("boom")
    with pytest.raises(ZeroDivisionError) as caught:
        launch(configure({}), [at_step(2, raising(error))])
    assert caught.value is error
    run = store.open("latest")
    assert (run.record.status, run.record.error) == ("failed", "ZeroDivisionError: boom")
    resume(set_up_resume(run), run)
    assert (run.record.status, run.record.error) == ("finished", None)


def test_the_peak_is_that_of_the_device_now(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    run = launch(configure({}), [at_step(2, lambda: signal.raise_signal(signal.SIGINT))]).run
    assert run.record.peak_flops == 200_000_000_000
    monkeypatch.setattr(device_module, "peak_flops", lambda device, dtype: 3e11)
    resume(set_up_resume(run), run)
    assert run.record.peak_flops == 300_000_000_000


# Where it was made


def test_the_commit_of_a_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lumiere, "__file__", str(tmp_path / "lumiere" / "__init__.py"))
    assert run_module.commit() is None
    (tmp_path / ".git").mkdir()
    assert run_module.commit() is None, "git is missing, or finds nothing there"
    monkeypatch.setattr(run_module.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="abc123\n"))
    assert run_module.commit() == "abc123"
