"""The checkpoints of runs by name: `best`, `latest`, `previous`, and snapshots such as `step-00000512`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lumiere.distributed import ProcessGroup
from lumiere.errors import CheckpointError, nearest
from lumiere.files import sync_folder
from lumiere.persistence import placing
from lumiere.persistence.checkpoint import GROUPS, Checkpoint, load_checkpoint, save_checkpoint, unwritable
from lumiere.persistence.placing import NAME_PATTERN, SUFFIX
from lumiere.persistence.runs import Run, RunStore

NAMES = ("best", "latest", "previous")


def checkpoint_names(run: Run) -> list[str]:
    """The checkpoints that a run has: `best`, `latest`, `previous`, then the snapshots by step."""
    names = placing.found(run.checkpoints_dir)
    return [name for name in NAMES if name in names] + sorted(names - set(NAMES), key=_step)


def snapshot_steps(run: Run) -> list[int]:
    """The steps whose weights the run has kept, rising."""
    return [_step(name) for name in checkpoint_names(run) if name not in NAMES]


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


OLD_NAMES = {"latest": "previous"}
"""What a checkpoint is called when another one has taken its name."""


class CheckpointManager:
    """Saves, finds and loads the checkpoints of runs.

    A `run` is a `Run`, or whatever `RunStore.open` takes. Names come from the folder's listing: what a user types is
    only ever compared with them, never made part of a path.

    Args:
        runs_dir: the folder of the runs, as for `RunStore`.
    """

    def __init__(self, runs_dir: Path | str | None = None) -> None:
        self._store = RunStore(runs_dir)

    def save(self, run: Run, name: str, checkpoint: Checkpoint) -> None:
        """Writes `checkpoint` under `name`; the `latest` before becomes `previous`.

        Raises:
            CheckpointError: it cannot be written; what was there is untouched.
            ValueError: `name` is not `best`, `latest` or `step-` and at least 8 digits.
        """
        _check_name(name)
        path = run.checkpoints_dir / f"{name}{SUFFIX}"
        try:
            placing.clear(run.checkpoints_dir)
            involved = {name, OLD_NAMES.get(name, name)}
            if any(form.is_dir() for one in involved for form in placing.present(run.checkpoints_dir, one)):
                temporary = placing.temporary_path(path)
                save_checkpoint(temporary, checkpoint)
                _place(temporary, run.checkpoints_dir, name)
            elif name == "latest" and path.is_file():
                _replace_latest(run, checkpoint)
            else:
                save_checkpoint(path, checkpoint)
        except OSError as error:
            raise unwritable(path, error) from error

    def save_shards(self, run: Run, name: str, checkpoint: Checkpoint, processes: ProcessGroup) -> None:
        """Writes `checkpoint` under `name` as a folder, its rows by the processes that have them; else as `save`.

        Every process of `processes` calls it, with the DTensors and plain tensors that `sharded.save_shards` takes.

        Raises:
            CheckpointError: a process cannot write; what was there is untouched.
            ValueError: as `save`, or a tensor is shared out otherwise than by rows.
        """
        from lumiere.persistence.sharded import save_shards

        _check_name(name)
        save_shards(run.checkpoints_dir / name, checkpoint, processes, _place)

    def load(self, run: Run | str, name: str, groups: Collection[str] = GROUPS, outlined: bool = False) -> Checkpoint:
        """The checkpoint `name`, or the snapshot of a step given as a bare number.

        Args:
            outlined: of one that is a folder, all groups without their numbers, as `outline_shards` gives them.

        Raises:
            RunNotFoundError: there is no such run.
            CheckpointError: the run has no such checkpoint, or it is damaged.
        """
        run = self._open(run)
        while True:
            path = placing.find(run.checkpoints_dir, self._find(run, name))
            before = _identity(path)
            try:
                if outlined and path.is_dir():
                    from lumiere.persistence.sharded import outline_shards

                    return outline_shards(path)
                return load_checkpoint(path, groups)
            except CheckpointError:
                # A training may have put another one in its place, which takes several steps with folders.
                if _identity(path) == before:
                    raise

    def load_latest(self, run: Run | str, outlined: bool = False) -> tuple[Checkpoint, str]:
        """The newest checkpoint to resume from, and its name: `previous`, or else `best`, where `latest` is damaged.

        Args:
            outlined: as in `load`.

        Raises:
            RunNotFoundError: there is no such run.
            CheckpointError: none of them can be read; the error is the one about the first that is there.
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
        """The checkpoint as a dictionary, in the words of torch.

        Returns:
            `model_state_dict`, `optimizer_state_dict`, `rng_state`, and what else was saved: `config`, `step`, ...

        Raises:
            RunNotFoundError, CheckpointError: as `load`.
        """
        checkpoint = self.load(run, name)
        return {
            **checkpoint.metadata,
            "model_state_dict": checkpoint.model,
            "optimizer_state_dict": checkpoint.optimizer,
            "rng_state": checkpoint.rng,
        }

    def names(self, run: Run | str) -> list[str]:
        """The checkpoints that a run has: `best`, `latest`, `previous`, then the snapshots by step."""
        return checkpoint_names(self._open(run))

    def resolve(self, run: Run | str, name: str) -> str:
        """Return the checkpoint to use for `name`: `latest` for a `best` that does not exist (the run stopped early).

        Any other name is returned unchanged, whether or not it exists.
        """
        folder = self._open(run).checkpoints_dir
        if name == "best" and not placing.is_there(folder, "best") and placing.is_there(folder, "latest"):
            return "latest"
        return name

    def remove(self, run: Run | str, name: str) -> None:
        """Deletes a checkpoint.

        Raises:
            RunNotFoundError: there is no such run.
            CheckpointError: the run has no such checkpoint, or it cannot be deleted.
        """
        run = self._open(run)
        name = self._find(run, name)
        try:
            placing.remove(run.checkpoints_dir, name)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {name} of run {run.id} cannot be deleted: {error.strerror or error}",
                f"check the permissions of {run.checkpoints_dir}/",
            ) from error

    def _open(self, run: Run | str) -> Run:
        return run if isinstance(run, Run) else self._store.open(run)

    def _find(self, run: Run, name: str) -> str:
        """The full name of the checkpoint that the user calls `name`."""
        names = self.names(run)
        is_step = re.fullmatch("[0-9]+", name)
        full_name = f"step-{name.zfill(8)}" if is_step else name
        if full_name in names:
            return full_name
        if not names:
            hint = f"it was stopped before its first save: {run.command('train', '--resume', run.id)}"
        else:
            guess = nearest(name, names)
            hint = f"it has {', '.join(names)}" + (f"; did you mean {guess}?" if guess else "")
        raise CheckpointError(f"run {run.id} has no checkpoint {name!r}", hint)


def _check_name(name: str) -> None:
    if not NAME_PATTERN.fullmatch(name) or name == "previous":
        raise ValueError(f"{name!r} is no name for a checkpoint: best, latest, or step- and 8 digits")


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _place(finished: Path, folder: Path, name: str) -> None:
    placing.place(finished, folder, name, OLD_NAMES.get(name))


def _replace_latest(run: Run, checkpoint: Checkpoint) -> None:
    """Writes a new `latest` and makes the old one `previous`.

    In this order there is a loadable checkpoint at every instant, also where the old `latest` is damaged and only
    `previous` is whole: that one goes when the new `latest` is there.
    """
    latest, aside = run.checkpoints_dir / f"latest{SUFFIX}", run.checkpoints_dir / ".previous.tmp"
    try:
        try:
            os.link(latest, aside)
        except OSError:  # a file system without hard links
            shutil.copyfile(latest, aside)
        save_checkpoint(latest, checkpoint)
        os.replace(aside, run.checkpoints_dir / f"previous{SUFFIX}")
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(run.checkpoints_dir)
