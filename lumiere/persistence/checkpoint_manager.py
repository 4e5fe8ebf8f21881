"""The checkpoints of runs by name: `best`, `latest`, `previous`, and snapshots such as `step-00000512`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lumiere.errors import CheckpointError, nearest
from lumiere.persistence.atomic import sync_folder
from lumiere.persistence.checkpoint import GROUPS, Checkpoint, load_checkpoint, save_checkpoint, unwritable
from lumiere.persistence.checkpoint_names import NAME_PATTERN, SUFFIX, checkpoint_names
from lumiere.persistence.runs import Run, RunStore


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
        if not NAME_PATTERN.fullmatch(name) or name == "previous":
            raise ValueError(f"{name!r} is no name for a checkpoint: best, latest, or step- and 8 digits")
        path = _path(run, name)
        try:
            for leftover in run.checkpoints_dir.glob(".*.tmp"):  # of a process that was killed while it saved
                if not leftover.is_dir():
                    leftover.unlink(missing_ok=True)
            if name == "latest" and path.is_file():
                _replace_latest(run, checkpoint)
            else:
                save_checkpoint(path, checkpoint)
        except OSError as error:
            raise unwritable(path, error) from error

    def load(self, run: Run | str, name: str, groups: Collection[str] = GROUPS) -> Checkpoint:
        """The checkpoint `name`, or the snapshot of a step given as a bare number.

        Raises:
            RunNotFoundError: there is no such run.
            CheckpointError: the run has no such checkpoint, or it is damaged.
        """
        run = self._open(run)
        return load_checkpoint(_path(run, self._find(run, name)), groups)

    def load_latest(self, run: Run | str) -> tuple[Checkpoint, str]:
        """The newest checkpoint to resume from, and its name: `previous`, or else `best`, where `latest` is damaged.

        Raises:
            RunNotFoundError: there is no such run.
            CheckpointError: none of them can be read; the error is the one about the first that is there.
        """
        run = self._open(run)
        present = [name for name in ("latest", "previous", "best") if name in self.names(run)]
        errors = []
        for name in present or ["latest"]:
            try:
                return self.load(run, name), name
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

    def remove(self, run: Run | str, name: str) -> None:
        """Deletes a checkpoint.

        Raises:
            RunNotFoundError: there is no such run.
            CheckpointError: the run has no such checkpoint.
        """
        run = self._open(run)
        _path(run, self._find(run, name)).unlink()

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
            hint = f"it was stopped before its first save: lumiere train --resume {run.id}"
        else:
            guess = nearest(name, names)
            hint = f"it has {', '.join(names)}" + (f"; did you mean {guess}?" if guess else "")
        raise CheckpointError(f"run {run.id} has no checkpoint {name!r}", hint)


def _replace_latest(run: Run, checkpoint: Checkpoint) -> None:
    """Writes a new `latest` and makes the old one `previous`.

    In this order there is a loadable checkpoint at every instant, also where the old `latest` is damaged and only
    `previous` is whole: that one goes when the new `latest` is there.
    """
    latest, aside = _path(run, "latest"), run.checkpoints_dir / ".previous.tmp"
    try:
        try:
            os.link(latest, aside)
        except OSError:  # a file system without hard links
            shutil.copyfile(latest, aside)
        save_checkpoint(latest, checkpoint)
        os.replace(aside, _path(run, "previous"))
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(run.checkpoints_dir)


def _path(run: Run, name: str) -> Path:
    return run.checkpoints_dir / f"{name}{SUFFIX}"
