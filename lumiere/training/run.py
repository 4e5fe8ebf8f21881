"""Start a training run, or resume one from its newest checkpoint."""

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lumiere
from lumiere.config.loader import dump_config
from lumiere.config.schema import RunConfig
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup, noticing_losses
from lumiere.errors import CheckpointError, LumiereError
from lumiere.files import locked, write_atomically, writing
from lumiere.persistence.checkpoint import DAMAGE_HINT, Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.liveness import beating, this_process
from lumiere.persistence.loading import check_compatible
from lumiere.persistence.metrics import MetricsWriter, truncate_metrics
from lumiere.persistence.placing import clear, delete
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.costs import disk
from lumiere.training.events import Callback, WarningEvent
from lumiere.training.loggers import MetricsLog, opened_loggers
from lumiere.training.parallel import own_device
from lumiere.training.schedule import num_steps
from lumiere.training.setup import TrainingSetup, changes, check_schedule, inexact_changes, trained_config
from lumiere.training.sharing import check_shares, hand_out
from lumiere.training.state import NUMERICS, STOP_REASONS
from lumiere.training.trainer import TrainingResult, progress, train


def start(
    setup: TrainingSetup,
    store: RunStore,
    command: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    processes: ProcessGroup = SINGLE_PROCESS,
) -> TrainingResult:
    """Make a run and train it.

    Args:
        command: what the user typed, for the record.
        processes: the processes that train it together; this one has rank 0, the others call `follow`.

    Raises:
        LumiereError: if the disk has no room, or the runs directory cannot be written to, or the processes cannot
            share the batches.
    """
    check_shares(setup.config.training, setup.device, processes)
    check_room(store.runs_dir, setup)
    run = store.create()
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run.path))
            write_files(setup, run, command)
            record_start(setup, run, processes)
        except BaseException as error:
            with contextlib.suppress(OSError):
                delete(run.path)
            if isinstance(error, LumiereError):
                hint = "make room, or choose another folder with --runs-dir; no run was made"
                raise LumiereError(error.message, hint) from error
            raise
        return run_training(setup, run, callbacks, None, processes)


def write_files(setup: TrainingSetup, run: Run, command: Sequence[str]) -> None:
    """Write the tokenizer, the config and the record of a new run."""
    with writing(run.path):
        write_atomically(run.tokenizer_path, setup.corpus.tokenizer.to_json().encode())
        # The config last: a run that has one can be resumed, wherever its process was killed.
        write_atomically(run.config_path, dump_config(setup.config).encode())
    run.update(
        name=run.name,
        created_at=now(),
        command=list(command),
        num_parameters=setup.num_parameters,
        dataset=setup.config.dataset.name,
        corpus_sha256=setup.corpus.fingerprint,
        splits={name: asdict(split.facts) for name, split in setup.corpus.splits.items()},
        step=0,
        best_loss=None,
        **environment(),
    )


def record_start(setup: TrainingSetup, run: Run, processes: ProcessGroup) -> None:
    """Record that the run is running, and where."""
    run.update(
        status="running",
        error=None,
        device=str(setup.device),
        precision=str(setup.precision).removeprefix("torch."),
        total_steps=num_steps(setup.config.training, setup.epoch_steps),
        **this_process(),
        world_size=processes.size,
        job=job(processes),
        peak_flops=round(setup.peak_flops * processes.size),
    )


def resume(
    setup: TrainingSetup, run: Run, callbacks: Sequence[Callback] = (), processes: ProcessGroup = SINGLE_PROCESS
) -> TrainingResult:
    """Go on with a run from its newest checkpoint, or from step 0 where it was killed before the first.

    The config of `setup` becomes the run's, where it is another one.

    Raises:
        RunBusyError: another process is training it.
        CheckpointError: if the checkpoint is damaged, or belongs to another model.
        ConfigError: if the schedule cannot be brought to another length any more, or the processes cannot share the
            batches.
    """
    check_shares(setup.config.training, setup.device, processes)
    with locked(run.path):
        # A restart by torchrun may be on another host, and the processes before it have ended.
        if processes.job is None or token(run) != processes.job:
            run.check_not_elsewhere()
        checkpoint, name = newest_checkpoint(run, outlined=setup.config.training.parallel == "fsdp")
        step = checkpoint.step if checkpoint else 0
        if checkpoint is not None:
            check_compatible(setup.config, checkpoint, f"the {name} checkpoint of run {run.id}")
        check_schedule(run.load_config().training, setup.config.training, setup.epoch_steps, step)
        if checkpoint and name != "latest":
            # A process may be killed after it has saved `best`, and before `latest` of the same step.
            there = "latest" in CheckpointManager(run.path.parent).names(run)
            problem = "the latest checkpoint is damaged" if there else "there is no latest checkpoint"
            message = f"{problem}, training goes on from {name} (step {step:,})"
            for callback in callbacks:
                callback(WarningEvent(step, message))
        warnings = resume_warnings(checkpoint, name, setup, run.record, processes) if checkpoint and name else []
        for message in warnings:
            for callback in callbacks:
                callback(WarningEvent(step, message))
        with writing(run.path):
            remove_leftovers(run)
        # Where nothing was saved, every line goes.
        truncate_metrics(run.metrics_path, step if checkpoint else -1)
        changed = changes(run.load_config(), setup.config)
        entry = {"at": now(), "step": step, "changed": list(map(str, changed)), "warnings": warnings}
        run.update(resumes=[*run.record.resumes, entry])
        if changed:
            with writing(run.config_path):
                write_atomically(run.config_path, dump_config(setup.config).encode())
        record_start(setup, run, processes)
        return run_training(setup, run, callbacks, checkpoint, processes)


def inexactness(checkpoint: Checkpoint, before: RunConfig, after: RunConfig, processes: ProcessGroup) -> str | None:
    """What a training that other processes go on with cannot keep as it was; None where all is kept.

    Args:
        before: the config that the checkpoint was trained with.
        after: the config to go on with.
    """
    size = checkpoint.metadata.get("world_size", 1)
    old, new = process_count(size, before), process_count(processes.size, after)
    if old == new:
        return None
    # The masks depend on the seed, the step and the rank.
    masks = after.model.dropout > 0.0 and size != processes.size
    lost = "the dropout masks and the order of its sums" if masks else "the order of its sums"
    return (
        f"trained so far with {old}, now with {new}: the data and its order stay, {lost} do not, so the weights will "
        f"differ from those of never having stopped"
    )


def resume_warnings(
    checkpoint: Checkpoint, name: str, setup: TrainingSetup, record: RunRecord, processes: ProcessGroup
) -> list[str]:
    """Return the reasons why a resumed run will not be bit-identical to an uninterrupted one.

    Args:
        name: of the checkpoint to resume from.
        record: contents of `run.json`, with the device and the precision so far.
    """
    before = trained_config(checkpoint.metadata.get("config"), name)
    warnings = [inexactness(checkpoint, before, setup.config, processes), other_numerics(checkpoint)]
    if changed := inexact_changes(before, setup, record):
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


def process_count(size: int, config: RunConfig) -> str:
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
    reason = run.record.stop_reason
    if run.status == "finished" and reason in STOP_REASONS:
        return reason
    checkpoint, _ = newest_checkpoint(run, outlined=True)
    reason = checkpoint.metadata.get("stop_reason") if checkpoint else None
    if reason is not None and reason not in STOP_REASONS:
        raise CheckpointError(f"the newest checkpoint of run {run.id} gives no reason why it ended", DAMAGE_HINT)
    return reason


def run_training(
    setup: TrainingSetup,
    run: Run,
    callbacks: Sequence[Callback],
    checkpoint: Checkpoint | None,
    processes: ProcessGroup,
) -> TrainingResult:
    """Train, and keep the run's status true however it ends."""
    try:
        with (
            beating(run.path),
            MetricsWriter(run.metrics_path) as writer,
            opened_loggers(setup.config, run, [MetricsLog(writer), *callbacks]) as all_listeners,
            noticing_losses(processes),
        ):
            hand_out(setup, run, checkpoint, processes)
            result = train(
                setup.config,
                setup.corpus,
                run,
                own_device(setup.device, processes),
                setup.precision,
                setup.peak_flops * processes.size,
                all_listeners,
                checkpoint,
                processes,
            )
            processes.barrier()
    except BaseException as error:
        # Also for KeyboardInterrupt: a second Ctrl-C leaves at once, with what was saved before.
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        # A full disk, or a folder that is gone, can be told of no longer: the run then counts as crashed.
        with contextlib.suppress(LumiereError):
            run.update(status=status, error=f"{type(error).__name__}: {error}")
        raise
    status = "finished" if result.signal_number is None else "interrupted"
    # The progress once more: a process that was killed right after its last save may not have come to write it down.
    progressed = progress(result.state, setup.epoch_steps)
    run.update(status=status, stop_reason=result.state.stop_reason, **progressed)
    return result


def check_room(runs_dir: Path, setup: TrainingSetup) -> None:
    """Refuse a run whose checkpoints the disk has no room for."""
    config = setup.config
    needed = disk(config, num_steps(config.training, setup.epoch_steps)).total
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


def environment() -> dict[str, Any]:
    """Versions, machine and the commit of a checkout, as `run.json` keeps them."""
    packages = ("torch", "numpy", "tokenizers", "datasets", "safetensors")
    return {
        "versions": {
            "lumiere": lumiere.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "commit": commit(),
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def commit() -> str | None:
    """The commit of the checkout that Lumiere runs from; None for an installed package."""
    folder = Path(lumiere.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def job(processes: ProcessGroup) -> dict[str, Any] | None:
    """Describe this launch of torchrun for `run.json`; None without torchrun. `token` alone identifies it."""
    if processes.job is None:
        return None
    return {
        "id": os.environ.get("TORCHELASTIC_RUN_ID"),
        "agent": f"{socket.gethostname()} {os.getppid()}",
        "arguments": sys.argv[1:],
        "token": processes.job,
    }


def restarted_run(store: RunStore, processes: ProcessGroup) -> Run | None:
    """Return the run that an earlier start of this very launch has made or resumed; None if there is none."""
    if processes.job is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    return next((run for run in store.all() if run.config_path.exists() and token(run) == processes.job), None)


def token(run: Run) -> str | None:
    """The token of the launch that trained the run last, by its record."""
    return run.record.job.get("token")
