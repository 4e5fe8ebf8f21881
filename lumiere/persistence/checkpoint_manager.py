"""The checkpoints of runs by name: `best`, `latest`, `previous`, and snapshots such as `step-00000512`."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.errors import CheckpointError, nearest
from lumiere.persistence import step_folders
from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint, load_outline
from lumiere.persistence.checkpoint_writer import together, write_checkpoint
from lumiere.persistence.manifest import GROUPS, missing
from lumiere.persistence.runs import Run, RunStore
from lumiere.persistence.step_folders import NAMES, SNAPSHOTS, snapshot_name, snapshot_step


def checkpoint_names(run: Run) -> list[str]:
    """Return the checkpoints of a run: `best`, `latest`, `previous`, then the snapshots by step."""
    return step_folders.checkpoint_names(run.checkpoints_dir)


def snapshot_steps(run: Run) -> list[int]:
    """Return the steps of a run's snapshots, in order."""
    return [snapshot_step(name) for name in checkpoint_names(run) if name not in NAMES]


class CheckpointManager:
    """Save, find, load and remove the checkpoints of runs.

    A `run` is a `Run`, or what `RunStore.open` accepts. The name of a checkpoint is compared with those that exist; it
    never becomes part of a path.

    Args:
        runs_dir: The folder of the runs, as for `RunStore`.
    """

    def __init__(self, runs_dir: Path | str | None = None) -> None:
        self._store = RunStore(runs_dir)

    def save(
        self,
        run: Run,
        names: str | Collection[str],
        checkpoint: Checkpoint,
        processes: ProcessGroup | None = None,
    ) -> None:
        """Write one folder and make `names` point to it; the `latest` before becomes `previous`.

        A kill at any instant leaves every name with a whole checkpoint.

        Args:
            names: `best`, `latest` or both; or `step-` and 8 digits, for a snapshot.
            processes: All of them call this, with the same names; each writes its rows of the tensors. None: this
                process alone writes full tensors.

        Raises:
            CheckpointError: It cannot be written; what existed is untouched.
            ValueError: There is no such name, or a tensor is sharded otherwise than by rows.
        """
        names, folder = [names] if isinstance(names, str) else list(names), run.checkpoints_dir
        stem, parent = snapshot_name(checkpoint.step), folder
        if names == [stem]:
            names, parent = [], folder / SNAPSHOTS
        elif not set(names) <= {"best", "latest"}:
            raise ValueError(f"{names} are not names for a checkpoint of step {checkpoint.step}: best, latest, {stem}")
        group, disk = processes or SINGLE_PROCESS, run.disk
        token = group.broadcast_text(secrets.token_hex(4) if group.rank == 0 else None)
        temporary = step_folders.temporary_path(parent, stem, token)

        def publish() -> None:
            if group.rank == 0:
                target = step_folders.place(temporary, stem, disk)
                if names:
                    step_folders.point(folder, names, target, disk)
                step_folders.clear(folder, disk)

        try:
            write_checkpoint(temporary, checkpoint, processes, disk)
            together(group, publish)
        except OSError as error:
            raise CheckpointError(
                f"{str(parent / stem)!r} cannot be written: {error.strerror or error}",
                "make room or check the folder's permissions; the checkpoints that existed are untouched",
            ) from error
        finally:
            if group.rank == 0 and temporary.exists():
                with contextlib.suppress(OSError):
                    disk.remove(temporary)

    def load(
        self,
        run: Run | str,
        name: str,
        groups: Collection[str] = GROUPS,
        outlined: bool = False,
        verify: bool = True,
    ) -> Checkpoint:
        """Load the checkpoint `name`, or the snapshot of a step given as a number.

        Args:
            outlined: Leave the tensors in the folder, as `load_outline` does, unless it is a file of format 1.
            verify: As for `load_outline`.

        Raises:
            RunNotFoundError: The run does not exist.
            CheckpointError: The run has no such checkpoint, or it is damaged.
        """
        run = self._open(run)
        while True:
            found = step_folders.find(run.checkpoints_dir, self._full_name(run, name))
            before = _identity(found)
            try:
                if found is None:
                    raise missing(run.checkpoints_dir / name)
                if outlined and found.is_dir():
                    return load_outline(found, verify)
                return load_checkpoint(found, groups)
            except CheckpointError:
                # Training may have replaced and removed it meanwhile.
                after = step_folders.find(run.checkpoints_dir, self._full_name(run, name))
                if _identity(after) == before:
                    raise

    def load_latest(self, run: Run | str, outlined: bool = False) -> tuple[Checkpoint, str]:
        """Load the newest checkpoint to resume from; return it with its name.

        If `latest` is damaged, that is `previous`, then `best`.

        Args:
            outlined: As in `load`.

        Raises:
            RunNotFoundError: The run does not exist.
            CheckpointError: None of them can be read; the error is that of the first that exists.
        """
        run = self._open(run)
        present = [name for name in ("latest", "previous", "best") if name in self.names(run)]
        errors = []
        for name in present or ["latest"]:
            try:
                return self.load(run, name, outlined=outlined), name
            except CheckpointError as error:
                errors.append(error)
        raise errors[0]

    def load_checkpoint(self, run: Run | str, name: str = "best") -> dict[str, Any]:
        """Load a checkpoint as a dictionary, in torch's terms.

        Returns:
            `model_state_dict`, `optimizer_state_dict`, `rng_state`, and the metadata: `config`, `step`, ...

        Raises:
            RunNotFoundError, CheckpointError: As `load`.
        """
        checkpoint = self.load(run, name)
        return {
            **checkpoint.metadata,
            "model_state_dict": checkpoint.model,
            "optimizer_state_dict": checkpoint.optimizer,
            "rng_state": checkpoint.rng,
        }

    def names(self, run: Run | str) -> list[str]:
        """Return the checkpoints of a run: `best`, `latest`, `previous`, then the snapshots by step."""
        return checkpoint_names(self._open(run))

    def resolve(self, run: Run | str, name: str) -> str:
        """Return the checkpoint to use for `name`: `latest` for a `best` that does not exist (the run stopped early).

        Any other name is returned unchanged, whether or not it exists.
        """
        names = self.names(run) if name == "best" else ["best"]
        return "latest" if "best" not in names and "latest" in names else name

    def remove(self, run: Run | str, *names: str) -> None:
        """Remove checkpoints.

        Raises:
            RunNotFoundError: The run does not exist.
            CheckpointError: The run lacks one of them, or one cannot be removed.
        """
        run = self._open(run)
        names = tuple(self._full_name(run, name) for name in names)
        try:
            step_folders.remove(run.checkpoints_dir, names, run.disk)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {', '.join(names)} of run {run.id} cannot be deleted: {error.strerror or error}",
                f"check the permissions of {run.checkpoints_dir}/",
            ) from error

    def _open(self, run: Run | str) -> Run:
        return run if isinstance(run, Run) else self._store.open(run)

    def _full_name(self, run: Run, name: str) -> str:
        """Return the full name of the checkpoint that the user calls `name`."""
        names = self.names(run)
        full_name = snapshot_name(int(name)) if re.fullmatch("[0-9]{1,18}", name) else name
        if full_name in names:
            return full_name
        if names:
            guess = nearest(name, names)
            hint = f"it has {', '.join(names)}" + (f"; did you mean {guess}?" if guess else "")
        else:
            hint = f"it was stopped before its first save: {run.command('train', '--resume', run.id)}"
        raise CheckpointError(f"run {run.id} has no checkpoint {name!r}", hint)


def _identity(path: Path | None) -> tuple[Path, int, int] | None:
    """Return what tells a file or folder from a later one of its name; None if it does not exist."""
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return (path, status.st_ino, status.st_mtime_ns) if path and status else None
