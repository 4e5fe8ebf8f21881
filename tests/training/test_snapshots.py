"""Which steps' weights are kept: the law of the set, and the files of a run."""

import pytest

from lumiere.persistence.checkpoint_manager import CheckpointManager, snapshot_steps
from lumiere.training import schedule
from lumiere.training.schedule import is_snapshot, most_snapshots
from lumiere.training.state import TrainingState
from tests.training.conftest import TrainedOnce
from tests.training.short import CPU, bits, hashes, short, train

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
    most = 0
    for reached in range(200_001):
        if is_snapshot(reached, reached):
            kept = {step for step in kept | {reached} if is_snapshot(step, reached)}
            most = max(most, len(kept))
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
        if reached < 1100 or reached % 512 < 2:
            assert most_snapshots(reached) == most, reached
    assert max(kept) == 200_000 // 4096 * 4096
    assert most == 11 + 64


def test_a_run_keeps_the_weights_of_these_steps(trained_once: TrainedOnce) -> None:
    config = short(max_steps=4, snapshots=True)
    run = trained_once(config)
    steps = [0, 1, 2, 4]
    assert snapshot_steps(run) == steps
    snapshots = [CheckpointManager().load(run, str(step)) for step in steps]
    assert [(snapshot.metadata["step"], snapshot.metadata["config"]) for snapshot in snapshots] == [
        (step, config.model_dump()) for step in steps
    ]
    assert bits(snapshots[0].model) == bits(TrainingState.create(config, CPU).model.state_dict())
    latest = hashes(run)
    assert hashes(run, "step-00000004") == {name: latest[name] for name in latest if name.startswith("model.")}


def test_a_run_drops_every_other_one_when_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LAST_POWER", 2)
    monkeypatch.setattr(schedule, "MAX_LATER", 3)
    assert snapshot_steps(train(short(max_steps=6, snapshots=True)).run) == [0, 1, 2, 4, 6]
    assert snapshot_steps(train(short(max_steps=9, snapshots=True)).run) == [0, 1, 2, 4, 8]
