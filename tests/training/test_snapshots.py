"""Which steps' weights are kept: the law of the set, and the files of a run."""

import pytest
import torch
from safetensors.torch import load_file

from lumiere.errors import CheckpointError
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.training import schedule
from lumiere.training.schedule import is_snapshot, most_snapshots
from lumiere.training.state import TrainingState

POWERS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def test_steps_by_hand() -> None:
    def later(reached: int) -> list[int]:
        return [step for step in range(513, reached + 1) if is_snapshot(step, reached)]

    assert later(1023) == []
    assert later(2100) == [1024, 1536, 2048]
    assert later(32_768) == list(range(1024, 32_769, 512))
    assert later(32_769) == list(range(1024, 32_769, 1024))
    assert later(65_537) == list(range(2048, 65_537, 2048))


def test_laws_up_to_200_000_steps() -> None:
    """The set is built as a training builds it: where a step is kept, others may go."""
    kept: set[int] = set()
    for reached in range(200_001):
        if not is_snapshot(reached, reached):
            continue
        kept = {step for step in kept | {reached} if is_snapshot(step, reached)}
        # What is kept was there before: nothing is wanted back that had gone, or that was never written.
        candidates = {*POWERS, *range(512, reached + 1, 512)}
        assert kept == {step for step in candidates if step <= reached and is_snapshot(step, reached)}
        assert {step for step in POWERS if step <= reached} <= kept
        later = sorted(step for step in kept if step > 512)
        assert len(later) <= 64
        if len(later) > 1:
            distance = later[1] - later[0]
            assert later == [step for step in range(0, reached + 1, distance) if step > 512]
            assert len(later) >= 32 or distance == 512, "no fewer than the limit asks for"
    assert max(kept) == 200_000 // 4096 * 4096


def test_the_most_there_ever_are() -> None:
    kept: set[int] = set()
    most = 0
    for reached in range(140_001):
        if is_snapshot(reached, reached):
            kept = {step for step in kept | {reached} if is_snapshot(step, reached)}
            most = max(most, len(kept))
        if reached < 1100 or reached % 512 < 2:
            assert most_snapshots(reached) == most, reached
    assert most == 11 + 64


def test_a_run_keeps_the_weights_of_these_steps(configure, launch, tensor_hashes) -> None:
    config = configure({"training.max_steps": 9})
    run = launch(config).run
    names = [name for name in CheckpointManager(run.path.parent).names(run) if name.startswith("step-")]
    assert names == ["step-00000000", "step-00000001", "step-00000002", "step-00000004", "step-00000008"]
    fresh = TrainingState.create(config, torch.device("cpu")).model.state_dict()
    first = load_file(run.checkpoints_dir / "snapshots/step-00000000/model.safetensors")
    assert set(first) == set(fresh)
    assert all(torch.equal(first[name], weight) for name, weight in fresh.items())
    # The last step of a training of four steps is a snapshot too, and `latest` shows what it should hold.
    stopped = launch(configure({"training.max_steps": 4})).run
    latest = tensor_hashes(stopped, "latest")
    assert tensor_hashes(stopped, "step-00000004") == {k: v for k, v in latest.items() if k.startswith("model.")}


def test_a_snapshot_says_its_step_and_cannot_be_resumed_from(configure, launch) -> None:
    config = configure({"training.max_steps": 2})
    run = launch(config).run
    snapshot = CheckpointManager(run.path.parent).load(run, "2")
    assert snapshot.metadata["step"] == 2
    assert snapshot.metadata["config"] == config.model_dump()
    with pytest.raises(CheckpointError, match="weights only"):
        TrainingState.create(config, torch.device("cpu")).restore(snapshot)


def test_a_run_drops_every_other_one_when_they_are_too_many(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LAST_POWER", 2)
    monkeypatch.setattr(schedule, "MAX_LATER", 3)

    def kept_after(num_steps: int) -> list[str]:
        run = launch(configure({"training.max_steps": num_steps})).run
        return [path.name.removeprefix("step-0000000") for path in sorted(run.checkpoints_dir.glob("snapshots/step-*"))]

    assert kept_after(6) == ["0", "1", "2", "4", "6"]
    assert kept_after(9) == ["0", "1", "2", "4", "8"]


def test_no_snapshots_at_all(configure, launch) -> None:
    run = launch(configure({"training.snapshots": False})).run
    assert CheckpointManager(run.path.parent).names(run) == ["best", "latest", "previous"]
