"""Start a training run, or resume one from its newest checkpoint.

Under torchrun every rank reads its own command line, config, corpus and checkpoint. Rank 0 creates or chooses the run,
resolves `auto`, writes and reports. It sends the others the run's name and what `auto` became, and all compare one
fingerprint.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lumiere
from lumiere.config.loader import dump_config
from lumiere.config.schema import RunConfig
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup, TorchrunGroup, noticing_losses
from lumiere.errors import CheckpointError, LumiereError
from lumiere.files import locked, writing
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.liveness import beating, this_process
from lumiere.persistence.loading import OpenedModel, check_compatible
from lumiere.persistence.manifest import DAMAGE_HINT
from lumiere.persistence.metrics import MetricsWriter, truncate_metrics
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run, RunStore
from lumiere.persistence.step_folders import clear, snapshot_name
from lumiere.training.costs import disk
from lumiere.training.events import Callback, WarningEvent, to_all
from lumiere.training.loggers import metrics_log, opened_loggers
from lumiere.training.parent import Parent, lineage, origin_of
from lumiere.training.setup import (
    INEXACT,
    Change,
    TrainingSetup,
    changes,
    check_schedule,
    check_shares,
    set_up_rank,
    trained_config,
    with_settings,
)
from lumiere.training.state import NUMERICS, STOP_REASONS
from lumiere.training.trainer import Trainer, TrainingResult, provenance


def start(
    setup: TrainingSetup,
    store: RunStore,
    command: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    processes: ProcessGroup = SINGLE_PROCESS,
) -> TrainingResult:
    """Create a run and train it. Called by rank 0; the other ranks call `follow`.

    Args:
        command: What the user typed, for the record.

    Raises:
        LumiereError: The disk is too small, the runs directory cannot be written to, or the processes cannot share the
            batches.
    """
    check_shares(setup.config.training, setup.device, processes)
    check_room(store.runs_dir, setup)
    # Loaded again, and before there is a run: the parent may have been trained on, or removed.
    parent = Parent(store.open(setup.lineage["run"]), setup.lineage["checkpoint"]).open() if setup.lineage else None
    if parent is not None:
        setup = replace(setup, lineage=lineage(parent))
    run = store.create()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run.path))
            write_files(setup, run, command, processes, parent)
            del parent  # its weights take memory
            record_start(setup, run, processes)
        except BaseException as error:
            with contextlib.suppress(OSError):
                run.disk.remove(run.path)
            if isinstance(error, LumiereError):
                hint = "make room, or choose another folder with --runs-dir; no run was made"
                raise LumiereError(error.message, hint) from error
            raise
        return run_training(setup, run, callbacks, None, None, processes)


def resume(
    setup: TrainingSetup, run: Run, callbacks: Sequence[Callback] = (), processes: ProcessGroup = SINGLE_PROCESS
) -> TrainingResult:
    """Resume a run from its newest checkpoint, or from step 0 if it has none. Called by rank 0, as `start`.

    The config of `setup` becomes the run's.

    Raises:
        RunBusyError: Another process is training it.
        CheckpointError: The checkpoint is damaged, or belongs to another model.
        ConfigError: The schedule cannot change its length any more, or the processes cannot share the batches.
    """
    check_shares(setup.config.training, setup.device, processes)
    with locked(run.path):
        # After a restart by torchrun the run may be on another host, and its earlier processes have ended.
        if processes.job is None or token(run) != processes.job:
            run.check_not_elsewhere()
        checkpoint, name = newest_checkpoint(run, outlined=setup.config.training.parallel == "fsdp")
        step = checkpoint.step if checkpoint else 0
        before = run.load_config()
        if checkpoint is not None:
            check_compatible(setup.config, checkpoint, f"the {name} checkpoint of run {run.id}")
        check_schedule(before.training, setup.config.training, setup.epoch_steps, step)
        warnings = resume_warnings(checkpoint, name, setup, run.record, processes) if checkpoint and name else []
        shown = list(warnings)
        if checkpoint and name != "latest":
            # A kill can leave a new `best` without the `latest` of the same step.
            exists = "latest" in CheckpointManager(run.path.parent).names(run)
            problem = "the latest checkpoint is damaged" if exists else "there is no latest checkpoint"
            message = f"{problem}; resuming from {name} (step {step:,})"
            shown.insert(0, message)
        for message in shown:
            to_all(callbacks)(WarningEvent(step, message))
        with writing(run.path):
            remove_leftovers(run)
        # Without a checkpoint, every line goes.
        truncate_metrics(run.metrics_path, step if checkpoint else -1, run.disk)
        changed = changes(before, setup.config)
        entry = {"at": now(), "step": step, "changed": list(map(str, changed)), "warnings": warnings}
        run.update(resumes=[*run.record.resumes, entry])
        if changed:
            with writing(run.config_path):
                run.disk.write(run.config_path, dump_config(setup.config).encode())
        record_start(setup, run, processes)
        return run_training(setup, run, callbacks, checkpoint, name or "", processes)


def follow(
    config: RunConfig | None,
    store: RunStore,
    settings: Mapping[str, Any],
    processes: TorchrunGroup,
    parent: Parent | None = None,
) -> TrainingResult | None:
    """Train the run that rank 0 starts or resumes; None if there is nothing to train.

    Args:
        config: Of this rank's command line. None: a run is resumed, with its own config.
        settings: What a resume changes, by dotted path; empty for a new run.
        parent: Of this rank's command line, for a new run.

    Raises:
        LumiereError: As `set_up` and `Trainer.train`, or this rank reads other files than rank 0.
    """
    choice = json.loads(processes.receive_choice())
    if choice is None:
        return None
    try:
        run = store.open(choice["run"])
    except LumiereError as error:
        hint = f"{store.runs_dir} must be one folder that all machines see"
        raise LumiereError(f"rank {processes.rank} does not find the run of rank 0: {error.message}", hint) from error
    checkpoint, origin = None, None
    if config is None or choice["resumes_from"] is not None:
        config, origin = with_settings(run.load_config(), settings), origin_of(run)
    elif parent is not None:
        origin = parent.origin()
    if choice["resumes_from"]:
        # Rank 0 has verified all of it; this rank verifies what it reads.
        checkpoint = CheckpointManager(run.path.parent).load(
            run, choice["resumes_from"], outlined=config.training.parallel == "fsdp", verify=False
        )
    setup = set_up_rank(config, choice, origin)
    return connected_trainer(setup, run, to_all(()), checkpoint, processes).train()


def dismiss(processes: ProcessGroup) -> None:
    """Let the other ranks know that there is nothing to train."""
    if isinstance(processes, TorchrunGroup):
        processes.send_choice(json.dumps(None))


def run_training(
    setup: TrainingSetup,
    run: Run,
    callbacks: Sequence[Callback],
    checkpoint: Checkpoint | None,
    resumes_from: str | None,
    processes: ProcessGroup,
) -> TrainingResult:
    """Train, and keep the status in the run's record correct however training ends.

    Args:
        resumes_from: The checkpoint's name; empty for a resume from step 0, None for a new run.
    """
    try:
        with (
            beating(run.path),
            MetricsWriter(run.metrics_path) as writer,
            opened_loggers(setup.config, run, [metrics_log(writer), *callbacks]) as emit,
            noticing_losses(processes),
        ):
            if isinstance(processes, TorchrunGroup):
                processes.send_choice(json.dumps({"run": run.name, "resumes_from": resumes_from} | setup.resolved))
            trainer = connected_trainer(setup, run, emit, checkpoint, processes)
            result = trainer.train()
    except BaseException as error:
        # Also for KeyboardInterrupt: a second Ctrl-C exits at once with what was saved before.
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        # A full disk or a removed folder cannot be recorded: the run then counts as crashed.
        with contextlib.suppress(LumiereError):
            run.update(status=status, error=f"{type(error).__name__}: {error}")
        raise
    status = "finished" if result.signal_number is None else "interrupted"
    # The progress again: the process of the last save may have been killed before it recorded it.
    run.update(status=status, stop_reason=result.state.stop_reason, **trainer.progress())
    return result


def connected_trainer(
    setup: TrainingSetup,
    run: Run,
    emit: Callback,
    checkpoint: Checkpoint | None,
    processes: ProcessGroup,
) -> Trainer:
    """Connect the ranks, check that all of them read the same, and return the trainer of this one."""
    if isinstance(processes, TorchrunGroup):
        processes.connect(setup.config.training.rank_timeout)
        metadata = json.dumps(checkpoint.metadata if checkpoint else None, sort_keys=True)
        facts = setup.fingerprint() | {"checkpoint": hashlib.sha256(metadata.encode()).hexdigest()}
        check_agreement(facts, processes)
    return Trainer(setup, run, emit, checkpoint, processes)


def check_agreement(facts: Mapping[str, str], processes: ProcessGroup) -> None:
    """Check that all ranks state the same facts.

    Raises:
        LumiereError: In all ranks, naming one that differs from rank 0.
    """
    for name, fact in facts.items():
        differs = processes.broadcast_text(fact) != fact
        rank = processes.all_reduce_max(processes.rank if differs else 0)
        if rank:
            raise LumiereError(
                f"rank {rank} of {processes.size} reads another {name} than rank 0",
                "give all ranks the same command line and config, and the same files at the same paths",
            )


# What a run records


def write_files(
    setup: TrainingSetup, run: Run, command: Sequence[str], processes: ProcessGroup, parent: OpenedModel | None
) -> None:
    """Write the tokenizer, the config and the record of a new run; if it has a parent, also the weights of step 0."""
    with writing(run.path):
        run.save_tokenizer(setup.corpus.tokenizer)
    if parent is not None:
        start = Checkpoint(parent.model.state_dict(), metadata=provenance(setup, run, processes) | {"step": 0})
        CheckpointManager(run.path.parent).save(run, snapshot_name(0), start)
    run.update(
        name=run.name,
        created_at=now(),
        command=list(command),
        num_parameters=setup.num_parameters,
        num_trained_parameters=setup.num_trained_parameters,
        parent=dict(setup.lineage) or None,
        dataset=setup.config.dataset.name,
        corpus_sha256=setup.corpus.fingerprint,
        splits={name: asdict(split.facts) for name, split in setup.corpus.splits.items()},
        step=0,
        best_loss=None,
        **environment(),
    )
    with writing(run.path):
        # The config last: a run that has one can be resumed, wherever its process was killed.
        run.disk.write(run.config_path, dump_config(setup.config).encode())


def record_start(setup: TrainingSetup, run: Run, processes: ProcessGroup) -> None:
    """Record that the run is running, and where."""
    run.update(
        status="running",
        error=None,
        **setup.resolved,
        total_steps=setup.total_steps,
        **this_process(),
        world_size=processes.size,
        job=job(processes),
        peak_flops=round(setup.peak_flops * processes.size),
    )


def environment() -> dict[str, Any]:
    """Return versions, machine and the commit of a checkout, as `run.json` keeps them."""
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
    """Return the commit of the checkout that Lumiere runs from; None for an installed package."""
    folder = Path(lumiere.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def now() -> str:
    """Return the time in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# Restarts by torchrun (`--max-restarts`)


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
    """Return the run that an earlier start of this very launch has created or resumed; None if there is none."""
    if processes.job is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    return next((run for run in store.all() if run.config_path.exists() and token(run) == processes.job), None)


def token(run: Run) -> str | None:
    """Return the token of the launch that trained the run last, by its record."""
    return run.record.job.get("token")


# What a resume starts from


def newest_checkpoint(run: Run, outlined: bool = False) -> tuple[Checkpoint, str] | tuple[None, None]:
    """Return the state to resume from and its name; None if the run was killed before it saved one.

    Args:
        outlined: As in `CheckpointManager.load`.
    """
    manager = CheckpointManager(run.path.parent)
    if not {"latest", "previous", "best"} & set(manager.names(run)):
        return None, None
    return manager.load_latest(run, outlined)


def stop_reason(run: Run) -> str | None:
    """Return why a run is over, by its record or its newest checkpoint; None if it can be resumed.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    # The record first: `runs prune` may have left only an earlier checkpoint of a finished run.
    reason = run.record.stop_reason
    if run.status == "finished" and reason in STOP_REASONS:
        return reason
    checkpoint, _ = newest_checkpoint(run, outlined=True)
    reason = checkpoint.metadata.get("stop_reason") if checkpoint else None
    if reason is not None and reason not in STOP_REASONS:
        raise CheckpointError(f"the newest checkpoint of run {run.id} gives no reason why it ended", DAMAGE_HINT)
    return reason


def remove_leftovers(run: Run) -> None:
    """Remove the unfinished files of a process that was killed while it wrote into the run."""
    clear(run.checkpoints_dir, run.disk)
    for leftover in run.path.rglob(".*.tmp"):
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)


def resume_warnings(
    checkpoint: Checkpoint, name: str, setup: TrainingSetup, record: RunRecord, processes: ProcessGroup
) -> list[str]:
    """Return the reasons why a resumed run will not be bit-identical to an uninterrupted one.

    Args:
        name: Of the checkpoint to resume from.
        record: Contents of `run.json`, with the device and the precision so far.
    """
    before, warnings = trained_config(checkpoint.metadata.get("config"), name), []
    size = checkpoint.metadata.get("world_size", 1)
    old, new = process_count(size, before), process_count(processes.size, setup.config)
    if old != new:
        # The masks depend on the seed, the step and the rank.
        masks = setup.config.model.dropout > 0.0 and size != processes.size
        lost = "the dropout masks and the order of sums" if masks else "the order of sums"
        warnings.append(
            f"trained so far with {old}, now with {new}: the data and its order stay the same, {lost} do not, so the "
            f"weights will differ from those of an uninterrupted run"
        )
    if checkpoint.metadata.get("numerics", 1) != NUMERICS:
        trained_by = checkpoint.metadata.get("lumiere_version", "unknown")
        warnings.append(
            f"trained so far with another Lumiere (version {trained_by}), whose training steps round differently: the "
            f"weights may differ in their last bits from those of an uninterrupted run"
        )
    recorded = {"device": record.device, "precision": record.precision}
    moved = [Change(key, recorded[key], value) for key, value in setup.resolved.items() if recorded[key] != value]
    changed = [change for change in moved if change.before is not None]
    changed += [change for change in changes(before, setup.config) if change.path in INEXACT]
    if changed:
        warnings.append(
            f"{', '.join(map(str, changed))}: the data and its order stay the same, but the weights will not be "
            f"bit-identical to those of an uninterrupted run"
        )
    return warnings


def process_count(size: int, config: RunConfig) -> str:
    """Return a text such as `2 processes (fsdp)`."""
    return "1 process" if size == 1 else f"{size} processes ({config.training.parallel})"


# Room on the disk


def check_room(runs_dir: Path, setup: TrainingSetup) -> None:
    """Refuse a run whose checkpoints do not fit on the disk."""
    needed = disk(setup.config, setup.total_steps, is_fine_tuned=bool(setup.lineage)).total
    folder, free = free_room(runs_dir)
    if free < needed:
        raise CheckpointError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, the checkpoints need {needed / 1e6:,.0f} MB",
            "make room, choose another disk with --runs-dir, or keep no snapshots: --set training.snapshots=false",
        )


def free_room(runs_dir: Path) -> tuple[Path, int]:
    """Return the closest existing folder of a runs directory, and the free bytes on its disk."""
    existing = next(folder for folder in (runs_dir.absolute(), *runs_dir.absolute().parents) if os.path.exists(folder))
    return existing, shutil.disk_usage(existing).free
