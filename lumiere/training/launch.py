"""From a preparation to a run that is trained, and on from where it stopped."""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lumiere.components.world import ALONE, World
from lumiere.config.loader import dump_config
from lumiere.config.schema import RunConfig
from lumiere.errors import CheckpointError, LumiereError
from lumiere.files import locked, write_atomically, writing
from lumiere.persistence.checkpoint import DAMAGE_HINT, Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.liveness import beating, check_not_elsewhere, this_process
from lumiere.persistence.loading import check_compatible
from lumiere.persistence.metrics import MetricsWriter, truncate_metrics
from lumiere.persistence.placing import clear, delete
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.costs import disk, num_steps
from lumiere.training.distributed import own_device
from lumiere.training.environment import environment
from lumiere.training.events import Listener, WarningEvent
from lumiere.training.extension import changes, check_schedule, inexact_changes
from lumiere.training.loggers.opening import opened_loggers
from lumiere.training.metrics_log import MetricsLog
from lumiere.training.preparation import Preparation, trained_config
from lumiere.training.processes import noticing_losses
from lumiere.training.restarts import job, token
from lumiere.training.saving import progress
from lumiere.training.sharing import check_shares, hand_out
from lumiere.training.state import NUMERICS, STOP_REASONS
from lumiere.training.trainer import TrainingResult, train


def start(
    preparation: Preparation,
    store: RunStore,
    command: Sequence[str] = (),
    listeners: Sequence[Listener] = (),
    world: World = ALONE,
) -> TrainingResult:
    """Make a run and train it.

    Args:
        command: what the user typed, for the record.
        world: the processes that train it together; this one has rank 0, the others call `follow`.

    Raises:
        LumiereError: if the disk has no room, or the runs directory cannot be written to, or the processes cannot
            share the batches.
    """
    check_shares(preparation.config.training, preparation.device, world)
    check_room(store.runs_dir, preparation)
    run = store.create()
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run.path))
            write_files(preparation, run, command)
            record_start(preparation, run, world)
        except BaseException as error:
            with contextlib.suppress(OSError):
                delete(run.path)
            if isinstance(error, LumiereError):
                hint = "make room, or choose another folder with --runs-dir; no run was made"
                raise LumiereError(error.message, hint) from error
            raise
        return supervise(preparation, run, listeners, None, world)


def write_files(preparation: Preparation, run: Run, command: Sequence[str]) -> None:
    """Write the tokenizer, the config and the record of a new run."""
    with writing(run.path):
        write_atomically(run.tokenizer_path, preparation.corpus.tokenizer.to_json().encode())
        # The config last: a run that has one can be resumed, wherever its process was killed.
        write_atomically(run.config_path, dump_config(preparation.config).encode())
    run.update(
        name=run.name,
        created_at=now(),
        command=list(command),
        num_parameters=preparation.num_parameters,
        dataset=preparation.config.dataset.name,
        corpus_sha256=preparation.corpus.fingerprint,
        splits={name: asdict(split.facts) for name, split in preparation.corpus.splits.items()},
        step=0,
        best_loss=None,
        **environment(),
    )


def record_start(preparation: Preparation, run: Run, world: World) -> None:
    """Record that the run is running, and where."""
    run.update(
        status="running",
        error=None,
        device=str(preparation.device),
        precision=str(preparation.precision).removeprefix("torch."),
        total_steps=num_steps(preparation.config.training, preparation.epoch_steps),
        **this_process(),
        world_size=world.size,
        job=job(world),
        peak_flops=round(preparation.peak_flops * world.size),
    )


def resume(
    preparation: Preparation, run: Run, listeners: Sequence[Listener] = (), world: World = ALONE
) -> TrainingResult:
    """Go on with a run from its newest checkpoint, or from step 0 where it was killed before the first.

    The config of `preparation` becomes the run's, where it is another one.

    Raises:
        RunBusyError: another process is training it.
        CheckpointError: if the checkpoint is damaged, or belongs to another model.
        ConfigError: if the schedule cannot be brought to another length any more, or the processes cannot share the
            batches.
    """
    check_shares(preparation.config.training, preparation.device, world)
    with locked(run.path):
        # A restart by torchrun may be on another host, and the processes before it have ended.
        if world.job is None or token(run) != world.job:
            check_not_elsewhere(run)
        checkpoint, name = newest_checkpoint(run, outlined=preparation.config.training.parallel == "fsdp")
        step = checkpoint.step if checkpoint else 0
        if checkpoint is not None:
            check_compatible(preparation.config, checkpoint, f"the {name} checkpoint of run {run.id}")
        check_schedule(run.load_config().training, preparation.config.training, preparation.epoch_steps, step)
        if checkpoint and name != "latest":
            # A process may be killed after it has saved `best`, and before `latest` of the same step.
            there = "latest" in CheckpointManager(run.path.parent).names(run)
            problem = "the latest checkpoint is damaged" if there else "there is no latest checkpoint"
            message = f"{problem}, training goes on from {name} (step {step:,})"
            for listener in listeners:
                listener(WarningEvent(step, message))
        warnings = resume_warnings(checkpoint, name, preparation, run.record, world) if checkpoint and name else []
        for message in warnings:
            for listener in listeners:
                listener(WarningEvent(step, message))
        with writing(run.path):
            remove_leftovers(run)
        # Where nothing was saved, every line goes.
        truncate_metrics(run.metrics_path, step if checkpoint else -1)
        changed = changes(run.load_config(), preparation.config)
        earlier = run.record.get("resumes")
        resumes = earlier if isinstance(earlier, list) else []  # a file that was edited may hold anything
        entry = {"at": now(), "step": step, "changed": list(map(str, changed)), "warnings": warnings}
        run.update(resumes=[*resumes, entry])
        if changed:
            with writing(run.config_path):
                write_atomically(run.config_path, dump_config(preparation.config).encode())
        record_start(preparation, run, world)
        return supervise(preparation, run, listeners, checkpoint, world)


def inexactness(checkpoint: Checkpoint, before: RunConfig, after: RunConfig, world: World) -> str | None:
    """What a training that other processes go on with cannot keep as it was; None where all is kept.

    Args:
        before: the config that the checkpoint was trained with.
        after: the config to go on with.
    """
    size = checkpoint.metadata.get("world_size", 1)
    old, new = processes(size, before), processes(world.size, after)
    if old == new:
        return None
    # The masks depend on the seed, the step and the rank.
    masks = after.model.dropout > 0.0 and size != world.size
    lost = "the dropout masks and the order of its sums" if masks else "the order of its sums"
    return (
        f"trained so far with {old}, now with {new}: the data and its order stay, {lost} do not, so the weights will "
        f"differ from those of never having stopped"
    )


def resume_warnings(
    checkpoint: Checkpoint, name: str, preparation: Preparation, record: Mapping[str, Any], world: World
) -> list[str]:
    """Return the reasons why a resumed run will not be bit-identical to an uninterrupted one.

    Args:
        name: of the checkpoint to resume from.
        record: contents of `run.json`, with the device and the precision so far.
    """
    before = trained_config(checkpoint.metadata.get("config"), name)
    warnings = [inexactness(checkpoint, before, preparation.config, world), other_numerics(checkpoint)]
    if changed := inexact_changes(before, preparation, record):
        warnings.append(
            f"{', '.join(map(str, changed))}: the data and its order stay the same, but the weights will not be "
            f"bit-identical to those of an uninterrupted run"
        )
    return [warning for warning in warnings if warning]


def other_numerics(checkpoint: Checkpoint) -> str | None:
    """A warning where another version of Lumiere, which rounds differently, trained the checkpoint; None elsewhere."""
    if checkpoint.metadata.get("numerics", 1) == NUMERICS:
        return None
    version = checkpoint.metadata.get("lumiere_version", "unknown")
    return (
        f"trained so far with another Lumiere (version {version}), whose training steps round differently: the weights "
        f"may differ in their last bits from those of an uninterrupted run"
    )


def processes(size: int, config: RunConfig) -> str:
    """`2 processes (fsdp)`."""
    return "1 process" if size == 1 else f"{size} processes ({config.training.parallel})"


def now() -> str:
    """The time in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def remove_leftovers(run: Run) -> None:
    """Remove the unfinished files of a process that was killed while it wrote into the run."""
    clear(run.checkpoints_dir)
    for leftover in run.path.rglob(".*.tmp"):
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)


def newest_checkpoint(run: Run, outlined: bool = False) -> tuple[Checkpoint, str] | tuple[None, None]:
    """The state to go on from and its name; None where the run was killed before it saved one.

    Args:
        outlined: as in `CheckpointManager.load`.
    """
    manager = CheckpointManager(run.path.parent)
    if not {"latest", "previous", "best"} & set(manager.names(run)):
        return None, None
    return manager.load_latest(run, outlined)


def stop_reason(run: Run) -> str | None:
    """Why a run is over, by its record or its newest checkpoint; None where it can go on.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    # The record first: `runs prune` may have left a finished run no more than an earlier checkpoint.
    reason = run.record.get("stop_reason")
    if run.status == "finished" and reason in STOP_REASONS:
        return reason
    checkpoint, _ = newest_checkpoint(run, outlined=True)
    reason = checkpoint.metadata.get("stop_reason") if checkpoint else None
    if reason is not None and reason not in STOP_REASONS:
        raise CheckpointError(f"the newest checkpoint of run {run.id} gives no reason why it ended", DAMAGE_HINT)
    return reason


def supervise(
    preparation: Preparation,
    run: Run,
    listeners: Sequence[Listener],
    checkpoint: Checkpoint | None,
    world: World,
) -> TrainingResult:
    """Train, and keep the run's status true however it ends."""
    try:
        with (
            beating(run.path),
            MetricsWriter(run.metrics_path) as writer,
            opened_loggers(preparation.config, run, [MetricsLog(writer), *listeners]) as all_listeners,
            noticing_losses(world),
        ):
            hand_out(preparation, run, checkpoint, world)
            result = train(
                preparation.config,
                preparation.corpus,
                run,
                own_device(preparation.device, world),
                preparation.precision,
                preparation.peak_flops * world.size,
                all_listeners,
                checkpoint,
                world,
            )
            world.wait()
    except BaseException as error:
        # Also for KeyboardInterrupt: a second Ctrl-C leaves at once, with what was saved before.
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        # A full disk, or a folder that is gone, can be told of no longer: the run then counts as crashed.
        with contextlib.suppress(LumiereError):
            run.update(status=status, error=f"{type(error).__name__}: {error}")
        raise
    status = "finished" if result.signal_number is None else "interrupted"
    # The progress once more: a process that was killed right after its last save may not have come to write it down.
    progressed = progress(result.state, preparation.epoch_steps)
    run.update(status=status, stop_reason=result.state.stop_reason, **progressed)
    return result


def check_room(runs_dir: Path, preparation: Preparation) -> None:
    """Refuse a run whose checkpoints the disk has no room for."""
    config = preparation.config
    needed = disk(config, num_steps(config.training, preparation.epoch_steps)).total
    folder, free = free_room(runs_dir)
    if free < needed:
        raise CheckpointError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, the checkpoints need {needed / 1e6:,.0f} MB",
            "make room, choose another disk with --runs-dir, or do without snapshots: --set training.snapshots=false",
        )


def free_room(runs_dir: Path) -> tuple[Path, int]:
    """The folder that is there of a runs directory that may not be, and the bytes that are free on its disk."""
    existing = next(folder for folder in (runs_dir.absolute(), *runs_dir.absolute().parents) if os.path.exists(folder))
    return existing, shutil.disk_usage(existing).free
