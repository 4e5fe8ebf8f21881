"""A run that starts from the weights of another: what it has from its parent, and that it needs it no more."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lumiere.config.loader import load_config
from lumiere.config.schema import RunConfig
from lumiere.data.dataset import TokenizedCorpus, tokenize_corpus
from lumiere.errors import CheckpointError, ConfigError, LumiereError
from lumiere.evaluation.loss import evaluate
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.loading import open_corpus, open_model
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import run as run_module
from lumiere.training.events import Event
from lumiere.training.parent import Parent, origin_of
from lumiere.training.setup import set_up
from tests.checkpoints import copy_fixture, folder_of, remove_pointers
from tests.torchrun import NO_DROPOUT, assert_same_training, forked
from tests.training.conftest import TrainedOnce
from tests.training.short import (
    Trained,
    at_step,
    hashes,
    names,
    raising,
    resume,
    short,
    stop_at,
    train,
)

OTHER_TEXT = {"dataset.name": "chains", "dataset.num_documents": 20}
UNMOVED: dict[str, Any] = {"learning_rate": 1e-30, "warmup_steps": 0}
"""No weight that is larger than 1e-23 changes by such a rate in float32."""


def fine_tune(parent: Run, config: RunConfig, *callbacks: Any, checkpoint: str = "best") -> Trained:
    """Train a new run beside its parent."""
    events: list[Event] = []
    found = Parent(parent, checkpoint)
    setup = set_up(found.inherit(config.model_dump()), origin=found.origin())
    store = RunStore(parent.path.parent)
    return Trained(run_module.start(setup, store, callbacks=[events.append, *callbacks]), events)


def weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, read without any code of ours."""
    return load_file(folder_of(run, name) / "model.safetensors")


def loss(run: Run, checkpoint: str, corpus: TokenizedCorpus, config: RunConfig) -> float:
    """The validation loss of a checkpoint on any corpus."""
    windows, facts = corpus.windows("validation", config), corpus.splits["validation"].facts
    return evaluate(run.load_model(checkpoint), windows, facts, config.training.batch_size).loss


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}])
def test_without_learning_it_is_the_parent(trained_once: TrainedOnce, changes: dict[str, Any]) -> None:
    """Of an average of weights, what was evaluated and saved is where it starts."""
    config = short(**changes)
    parent = trained_once(config)
    child = fine_tune(parent, short(**changes, **UNMOVED))
    for name in ("step-00000000", "best", "latest"):
        found = weights(child.run, name)
        assert all(torch.equal(found[key], weight) for key, weight in weights(parent, "best").items())
    assert child.run.record.best_loss == parent.record.best_loss
    assert child.run.tokenizer_path.read_bytes() == parent.tokenizer_path.read_bytes()
    assert (child.run.config_path.exists(), child.state.step) == (True, 6)


def test_it_starts_with_a_new_optimizer_and_schedule(trained_once: TrainedOnce) -> None:
    parent = trained_once(short())
    child = fine_tune(parent, short(max_steps=3, learning_rate=0.25))
    assert [event.learning_rate for event in child.steps] != [event.learning_rate for event in train(short()).steps][:3]
    optimizer = load_file(folder_of(child.run, "latest") / "optimizer.safetensors")
    assert {float(tensor) for name, tensor in optimizer.items() if name.endswith(".step")} == {3.0}


def test_the_tokenizer_is_the_parents_on_any_text(trained_once: TrainedOnce) -> None:
    parent = trained_once(short())
    child = fine_tune(parent, short(OTHER_TEXT)).run
    own = train(short(OTHER_TEXT)).run.load_tokenizer()
    assert child.load_tokenizer().fingerprint == parent.load_tokenizer().fingerprint != own.fingerprint
    # Evaluation finds the same corpus again.
    opened = open_model(child.name, "best", "cpu", None)
    corpus = open_corpus(opened, "")
    assert corpus.fingerprint == child.record.corpus_sha256
    assert loss(child, "best", corpus, opened.config) == child.record.best_loss


def test_the_lineage(trained_once: TrainedOnce) -> None:
    parent = trained_once(short(snapshots=True))
    child = fine_tune(parent, short(OTHER_TEXT, snapshots=True), checkpoint="4").run
    expected = {
        "run": parent.name,
        "checkpoint": "4",
        "step": 4,
        "weights_sha256": open_model(parent.name, "4", "cpu", None).weights_sha256,
        "dataset": "stories",
        "parent": None,
    }
    assert child.record.parent == expected
    assert json.loads(child.record_path.read_text())["parent"] == expected
    assert open_model(child.name, "0", "cpu", None).weights_sha256 == expected["weights_sha256"]
    for name in ("step-00000000", "step-00000001", "latest"):
        assert CheckpointManager().load(child, name, groups=()).metadata["parent"] == expected
    grandchild = fine_tune(child, short(max_steps=1)).run
    assert [ancestor["run"] for ancestor in grandchild.record.ancestors] == [child.name, parent.name]
    assert grandchild.record.parent["dataset"] == "chains"


def test_without_best_it_starts_from_latest(trained_once: TrainedOnce) -> None:
    parent = trained_once(short(), stop=3)
    remove_pointers(parent, "best")
    child = fine_tune(parent, short(max_steps=1)).run
    assert (child.record.parent["checkpoint"], child.record.parent["step"]) == ("latest", 3)
    with pytest.raises(CheckpointError, match="no checkpoint '2'"):
        fine_tune(parent, short(), checkpoint="2")


@pytest.mark.slow
def test_the_loss_on_another_text_falls_and_that_on_the_first_rises() -> None:
    """With half of the model frozen, both change less."""
    quick = ["training.device=cpu", "training.precision=float32", "training.snapshots=false", "training.seed=0"]
    parent = train(load_config("tiny", [*quick, "dataset.num_documents=2000", "training.max_steps=300"])).run
    training = {"batch_size": 16, "max_steps": 150, "warmup_steps": 10, "learning_rate": 2e-3, "optimizer": "muon"}
    training |= {"device": "cpu", "precision": "float32", "snapshots": False}
    first, moved = tokenize_corpus(parent.load_config()), []
    for freeze in ([], ["embeddings", "positions", "blocks.0"]):
        found = Parent(parent, "best")
        config = found.inherit({"dataset": {"name": "chains"}, "training": training | {"freeze": freeze}})
        setup = set_up(config, origin=found.origin())
        child = run_module.start(setup, RunStore()).run
        losses = [
            [loss(child, name, corpus, config) for name in ("step-00000000", "best")]
            for corpus in (setup.corpus, first)
        ]
        moved += [after - before for before, after in losses]
        assert losses[1][0] == pytest.approx(parent.record.best_loss, abs=1e-6)
    new, old, new_frozen, old_frozen = moved
    assert new < new_frozen < -1
    assert old > old_frozen > 0.1


# Resuming


@pytest.mark.parametrize("end", ["interrupted", "killed"])
def test_resuming_does_not_need_the_parent(trained_once: TrainedOnce, end: str) -> None:
    """Killed before the first save, a run starts again, and not from random weights."""
    config = short(OTHER_TEXT, ema_decay=0.9, optimizer="muon", freeze=["embeddings", "blocks.attention"])
    parent = trained_once(short())
    whole = fine_tune(parent, config).run
    if end == "interrupted":
        run = fine_tune(parent, config, stop_at(3)).run
    else:
        with pytest.raises(ZeroDivisionError):
            fine_tune(parent, config, at_step(2, raising(ZeroDivisionError())))
        run = next(run for run in RunStore().all() if run not in (parent, whole))
        assert names(run) == ["step-00000000"]
    shutil.rmtree(parent.path)
    assert resume(run).end == (6, "max_steps")
    assert hashes(run) == hashes(whole)
    assert run.record.parent == whole.record.parent


def test_a_run_that_lost_its_record_still_knows_its_tokenizer(trained_once: TrainedOnce) -> None:
    run = fine_tune(trained_once(short()), short(OTHER_TEXT), stop_at(3)).run
    expected = run.record.parent
    run.record_path.unlink()
    origin = origin_of(run)
    assert origin is not None
    assert origin.lineage == expected
    resume(run)
    assert run.record.step == 6


def test_another_tokenizer_is_refused(trained_once: TrainedOnce, other_tokenizer_run: Run) -> None:
    run = fine_tune(trained_once(short()), short(OTHER_TEXT), stop_at(3)).run
    shutil.copy(other_tokenizer_run.tokenizer_path, run.tokenizer_path)
    with pytest.raises(CheckpointError, match="is not the tokenizer"):
        resume(run)


def test_what_a_resume_cannot_change_a_new_run_can(interrupted: Run) -> None:
    for override, is_named in {
        "dataset.seed=9": True,
        "training.learning_rate=1": True,
        "model.dropout=0.5": True,
        "model.num_layers=2": False,  # not with these weights
    }.items():
        with pytest.raises(ConfigError) as caught:
            resume(interrupted, overrides=[override])
        assert (f"--from {interrupted.id}" in (caught.value.hint or "")) == is_named


def test_a_run_that_cannot_be_made_leaves_nothing(trained_once: TrainedOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = trained_once(short())

    def fail(*given: object) -> None:
        raise LumiereError("no room")

    monkeypatch.setattr(CheckpointManager, "save", fail)
    with pytest.raises(LumiereError, match="no room"):
        fine_tune(parent, short())
    assert RunStore().all() == [parent]


def test_a_parent_that_is_removed_meanwhile(trained_once: TrainedOnce) -> None:
    parent = trained_once(short())
    setup = set_up(short(), origin=Parent(parent, "best").origin())
    shutil.rmtree(parent.path)
    with pytest.raises(LumiereError, match=f"no run '{parent.name}'"):
        run_module.start(setup, RunStore())
    assert RunStore().all() == []


# Parents of other kinds


@pytest.mark.parametrize("fixture", ["run_v1", "run_v1_fsdp", "run_v2_ema_muon", "run_v2_fsdp"])
def test_parents_of_every_format_and_in_shards(fixture: str) -> None:
    Path("runs").mkdir()
    parent = copy_fixture(fixture, Path("runs"))
    config = short(max_steps=1, **UNMOVED).model_dump(include={"dataset", "training"})
    found = Parent(parent, "best")
    setup = set_up(found.inherit(config), origin=found.origin())
    child = run_module.start(setup, RunStore()).run
    expected = parent.load_model("best").state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in weights(child, "latest").items())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_fine_tune_what_one_does(trained_once: TrainedOnce, parallel: str) -> None:
    parent = trained_once(short())
    changes: dict[str, Any] = {"parallel": parallel, "freeze": ["embeddings", "blocks.0.attention"], "ema_decay": 0.9}
    config = short(OTHER_TEXT | NO_DROPOUT, **changes)
    alone = fine_tune(parent, config).run
    run = forked(2, config, "runs", "--from", f"{parent.id}@best")
    assert run not in (alone, parent)
    assert_same_training(run, alone)
    assert run.record.parent == alone.record.parent
