"""From a config to a run: nothing is created that cannot be trained, and the run's files describe it completely."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import lumiere
from lumiere import device as device_module
from lumiere.config.loader import load_config
from lumiere.config.messages import setting_paths
from lumiere.errors import CheckpointError, LumiereError
from lumiere.evaluation.loss import Evaluation
from lumiere.persistence.liveness import HEARTBEAT_NAME
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import run as run_module
from lumiere.training import trainer
from lumiere.training.run import check_room, free_room
from lumiere.training.setup import set_up
from tests.training.short import PEAK_FLOPS, at_step, hashes, names, only_run, raising, resume, short, train

# What is refused


def test_a_full_disk_creates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is needed for `best`, `latest`, `previous`, one checkpoint being written, and the snapshots."""
    setup = set_up(short({"model.embedding_size": 1024}, max_steps=5, snapshots=True))
    # Float32 weights and AdamW's two averages of each; the weights at steps 0, 1, 2 and 4.
    needed = 4 * (4 * 3 + 4) * setup.num_parameters
    monkeypatch.setattr(run_module, "free_room", lambda runs_dir: (runs_dir, needed))
    check_room(Path("runs"), setup)
    monkeypatch.setattr(run_module, "free_room", lambda runs_dir: (runs_dir, needed - 1))
    with pytest.raises(CheckpointError, match=f"{needed / 1e6:,.0f} MB"):
        run_module.start(setup, RunStore())
    assert not Path("runs").exists()


def test_the_disk_is_that_of_the_closest_existing_folder(tmp_path: Path) -> None:
    folder, free = free_room(tmp_path / "not" / "yet")
    assert folder == tmp_path
    assert free > 0


def test_a_runs_directory_that_is_a_file_is_refused() -> None:
    Path("runs").write_text("")
    with pytest.raises(LumiereError, match="runs"):
        train(short())


# What is written


def test_the_record() -> None:
    setup = set_up(short())
    trained = run_module.start(setup, RunStore(), ["lumiere", "train"])
    state, record = trained.state, json.loads(trained.run.record_path.read_text())
    expected = {
        "name": trained.run.name,
        "command": ["lumiere", "train"],
        "device": "cpu",
        "precision": "float32",
        "num_parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "num_trained_parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "parent": None,
        "dataset": "stories",
        "corpus_sha256": setup.corpus.fingerprint,
        "total_steps": 6,
        "step": 6,
        "epoch": 6 / 5,
        "tokens": state.tokens,
        "training_seconds": state.seconds,
        "best_loss": state.best_loss,
        "best_step": state.best_step,
        "skipped_steps": 0,
        "status": "finished",
        "stop_reason": "max_steps",
        "error": None,
        "pid": os.getpid(),
        "peak_flops": int(PEAK_FLOPS),
        "world_size": 1,
        "job": None,
    }
    assert {key: record[key] for key in expected} == expected
    others = {"created_at", "versions", "commit", "machine", "host", "boot_id", "splits", "best_evaluation"}
    assert record.keys() - expected.keys() == others
    packages = {"lumiere", "python", "torch", "numpy", "tokenizers", "datasets", "safetensors"}
    assert record["versions"].keys() == packages
    assert record["versions"]["lumiere"] == lumiere.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", record["created_at"])
    tokenizer = setup.corpus.tokenizer
    assert trained.run.tokenizer_path.read_text() == tokenizer.to_json()
    assert trained.run.load_tokenizer().encode("Once upon a time") == tokenizer.encode("Once upon a time")


def test_the_record_keeps_the_best_evaluation_and_the_size_of_each_split(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5])

    def evaluate(*arguments: object) -> Evaluation:
        loss = next(losses)
        return Evaluation(loss, 2 * loss, 3 * loss, 4 * loss, 5 * loss, 6 * loss, 1000, 80, 3, 32, 0.5)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    config = short({"dataset.num_documents": 10}, eval_interval=2, max_steps=5)
    trained = train(config)
    record, scored = trained.run.record, trained.evaluations
    assert [(event.step, event.is_best) for event in scored] == [(2, True), (4, True), (5, False)]
    assert record.best_evaluation == {"step": 4} | asdict(scored[1].evaluation)
    assert (record.best_evaluation["word_perplexity"], record.best_step) == (12.0, 4)
    split = set_up(config).corpus.splits["train"]
    assert list(record.splits) == ["train", "validation", "test"]
    sizes = {"num_documents": 10, "num_tokens": len(split.ids), "sha256": split.facts.sha256}
    assert record.splits["train"].items() >= sizes.items()


def test_the_config_is_complete_and_repeats_the_run() -> None:
    config = short(seed=5)
    run = train(config).run
    written = yaml.safe_load(run.config_path.read_text())
    assert [f"{section}.{leaf}" for section, values in written.items() for leaf in values] == setting_paths()
    again = load_config(run.config_path)
    assert again == run.load_config() == config
    repeated = train(again).run
    assert hashes(repeated) == hashes(run)
    assert repeated.config_path.read_text() == run.config_path.read_text()


def test_setting_up_builds_no_model_and_creates_nothing(tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    stages: list[str] = []
    setup = set_up(short(), lambda progress: stages.append(progress.stage))
    # 320 tokens and 16 positions; query, key, value and output; gate, up and down; three gains; all of width 16.
    assert setup.num_parameters == 16 * (320 + 16 + 4 * 16 + 3 * 32 + 3)
    assert (str(setup.device), setup.precision) == ("cpu", torch.float32)
    assert "reading the corpus" in stages
    assert set(tmp_path.iterdir()) == before


# The status


def test_the_status_of_a_run_and_its_heartbeat() -> None:
    def beats() -> bool:
        return (only_run().path / HEARTBEAT_NAME).exists()

    seen: list[tuple[RunRecord, bool]] = []
    run = train(short(), at_step(2, lambda: seen.append((only_run().record, beats())))).run
    ((record, beating),) = seen
    assert (record.status, record.pid, record.step, beating) == ("running", os.getpid(), 0, True)
    assert (run.record.status, beats()) == ("finished", False)


def test_an_interrupted_run_records_the_peak_of_the_device_that_resumes_it(
    interrupted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = interrupted.record
    assert (record.status, record.stop_reason, record.step) == ("interrupted", None, 3)
    monkeypatch.setattr(device_module, "peak_flops", lambda device, dtype: 3e11)
    resume(interrupted)
    assert interrupted.record.peak_flops == 300_000_000_000


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ZeroDivisionError("boom"), "failed")]
)
def test_an_error_ends_it_at_once_and_is_recorded(error: BaseException, status: str) -> None:
    """The second Ctrl-C is one too."""
    with pytest.raises(type(error)) as caught:
        train(short(), at_step(2, raising(error)))
    assert caught.value is error
    run = only_run()
    assert (run.record.status, run.record.error) == (status, f"{type(error).__name__}: {error}")
    assert "latest" not in names(run)
    resume(run)
    assert (run.record.status, run.record.error) == ("finished", None)


def test_only_a_checkout_has_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lumiere, "__file__", str(tmp_path / "lumiere" / "__init__.py"))
    assert run_module.commit() is None
    (tmp_path / ".git").mkdir()
    assert run_module.commit() is None, "git is missing, or finds nothing there"
    monkeypatch.setattr(run_module.subprocess, "run", lambda *given, **options: SimpleNamespace(stdout="abc123\n"))
    assert run_module.commit() == "abc123"
