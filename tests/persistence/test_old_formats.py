"""Runs that earlier versions wrote load, generate and resume. Never regenerate or delete their folders."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from lumiere.errors import CheckpointError
from lumiere.generation.decoding import generate
from lumiere.generation.sampling import Sampling
from lumiere.persistence.catalog import checkpoint_files
from lumiere.persistence.checkpoint import read_metadata
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.metrics import read_metrics
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.events import Event, StepEvent, WarningEvent
from lumiere.training.run import resume
from lumiere.training.setup import set_up_resume
from tests.checkpoints import FIXTURES, copy_fixture

GOLDEN = json.loads((FIXTURES / "run_v1.golden.json").read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A copy of the run, and of the corpus that its config names."""
    shutil.copy(FIXTURES / "run_v1.corpus.txt", tmp_path / "corpus.txt")
    return copy_fixture("run_v1", tmp_path / "runs")


@pytest.mark.parametrize("checkpoint", ["best", "latest"])
def test_its_model_computes_what_it_computed(run: Run, checkpoint: str) -> None:
    logits = run.load_model(checkpoint).logits(torch.tensor([GOLDEN["tokens"]]))[0]
    first = GOLDEN["last_logits"]
    assert logits[-1, : len(first)].tolist() == pytest.approx(first, abs=2e-5)
    assert logits.logsumexp(-1).tolist() == pytest.approx(GOLDEN["logsumexp"], abs=2e-5)


def test_it_writes(run: Run) -> None:
    pieces = generate(run.load_model(), run.load_tokenizer(), "The owl", 12, Sampling(temperature=0.0))
    assert "".join(pieces) == GOLDEN["greedy"]


def test_what_it_says_of_itself(run: Run) -> None:
    metadata = read_metadata(run.checkpoints_dir / "best.safetensors")
    assert (metadata["step"], metadata["best_step"], metadata["stop_reason"]) == (9, 9, None)
    assert metadata["config"]["model"]["embedding_size"] == 4
    lines = read_metrics(run.metrics_path)
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 8, 8, 9, 10]
    assert lines[-2]["val_loss"] == metadata["best_loss"] == run.record.best_loss
    assert run.load_config().training.max_steps == 12


def test_it_can_be_resumed(run: Run) -> None:
    result = resume(set_up_resume(run), run)
    assert (result.state.step, run.record.status) == (GOLDEN["resumed"]["step"], "finished")
    lines = read_metrics(run.metrics_path)
    assert [line["step"] for line in lines] == GOLDEN["resumed"]["steps"]
    assert lines[-1]["val_loss"] == pytest.approx(GOLDEN["resumed"]["val_loss"], abs=1e-4)


def test_the_resume_of_an_older_version_says_once_that_bits_may_differ(run: Run) -> None:
    warnings: list[WarningEvent] = []

    def listen(event: Event) -> None:
        if isinstance(event, WarningEvent):
            warnings.append(event)
        if isinstance(event, StepEvent) and event.step == 10:
            signal.raise_signal(signal.SIGINT)

    assert resume(set_up_resume(run), run, [listen]).state.step == 10
    assert [warning.step for warning in warnings] == [9]
    assert resume(set_up_resume(run), run, [listen]).state.step == 12
    assert len(warnings) == 1


def test_a_newer_format_is_refused_with_the_way_out(run: Run) -> None:
    path = run.checkpoints_dir / "best.safetensors"
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, texts | {"lumiere_format": "7"})
    with pytest.raises(CheckpointError, match="'7'") as caught:
        run.load_model()
    assert caught.value.hint
    assert "git pull" in caught.value.hint


KINDS = {
    kind: expected
    for number in (1, 2)
    for kind, expected in json.loads(
        (FIXTURES / f"run_v{number}_kinds.golden.json").read_text(encoding="utf-8")
    ).items()
}
"""Runs with folders of shards, and with an average of the weights and Muon; both with snapshots."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Copy the run of a kind, and its corpus, into an empty current folder."""
    copy_fixture(request.param, tmp_path / "runs")
    shutil.copy(FIXTURES / "run_v1.corpus.txt", tmp_path / "corpus.txt")
    return request.param


def test_every_checkpoint_of_every_kind_loads(kind: str) -> None:
    run, expected = RunStore().open("latest"), KINDS[kind]["logsumexp"]
    assert CheckpointManager().names(run) == list(expected)
    for name, values in expected.items():
        logits = run.load_model(name).logits(torch.tensor([GOLDEN["tokens"]]))[0]
        assert logits.logsumexp(-1).tolist() == pytest.approx(values, abs=2e-5)
    assert all(file.problem is None for file in checkpoint_files(run))


def test_a_run_of_every_kind_is_resumed(kind: str) -> None:
    run = RunStore().open("latest")
    result = resume(set_up_resume(run, settings={"training.max_steps": 8}), run)
    assert result.state.step == KINDS[kind]["resumed"]["step"]
    losses = [line["val_loss"] for line in read_metrics(run.metrics_path) if "val_loss" in line]
    assert losses[-1] == pytest.approx(KINDS[kind]["resumed"]["val_loss"], abs=1e-4)
