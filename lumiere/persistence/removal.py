"""Deleting runs and checkpoints so that whatever is left is whole, whenever the process is killed."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lumiere.errors import LumiereError, nearest
from lumiere.persistence.atomic import sync_folder
from lumiere.persistence.checkpoint_names import NAMES, checkpoint_names
from lumiere.persistence.inventory import disk_bytes
from lumiere.persistence.liveness import check_not_elsewhere, running
from lumiere.persistence.lock import locked
from lumiere.persistence.placing import delete, present, remove
from lumiere.persistence.runs import NAME_PATTERN, Run, RunStore

ASIDE_PATTERN = re.compile(rf"\.removed\.{NAME_PATTERN.pattern}\.[0-9a-f]{{8}}")
SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Pruning:
    """What is to be deleted of one run.

    Attributes:
        names: of the checkpoints that go; none where the run is left alone.
        num_bytes: that the disk gets back.
        reason: why the run is left alone.
    """

    run: Run
    names: tuple[str, ...] = ()
    num_bytes: int = 0
    reason: str | None = None


def check_removable(run: Run) -> None:
    """Refuses a run that is being trained.

    Raises:
        RunBusyError: its status is running.
    """
    if run.status == "running":
        raise running(run, run.record)


def remove_run(run: Run) -> None:
    """Deletes a run; of a run that is a link, the link.

    The folder is first renamed to a name that is no run's: a run is there as a whole or not at all, also for a process
    that is killed in between. `remove_leftovers` then finds the rest.

    Raises:
        LumiereError: it is running, or cannot be deleted.
    """
    import secrets

    check_removable(run)
    aside = run.path.with_name(f".removed.{run.name}.{secrets.token_hex(4)}")
    try:
        with locked(run.path):  # so that no training begins in between
            check_not_elsewhere(run)
            os.rename(run.path, aside)
        sync_folder(run.path.parent)
        delete(aside)
    except OSError as error:
        raise LumiereError(
            f"run {run.id} cannot be removed: {error.strerror or error}", f"check the permissions of {run.path.parent}/"
        ) from error


def remove_leftovers(store: RunStore) -> None:
    """Deletes what a killed `remove_run` has left; what cannot be deleted stays for the next time."""
    try:
        names = os.listdir(store.runs_dir)
    except OSError:
        return
    for name in names:
        if ASIDE_PATTERN.fullmatch(name):
            try:
                delete(store.runs_dir / name)
            except OSError:
                continue


def parse_keep(keep: str) -> tuple[str, ...]:
    """`best,latest,512` as the names of checkpoints; `snapshots` stands for all of them.

    Raises:
        LumiereError: a word is neither a checkpoint nor a step.
    """
    words = (*NAMES, SNAPSHOTS)
    names = []
    for word in (part.strip() for part in keep.split(",")):
        if re.fullmatch("[0-9]+", word):
            names.append(f"step-{word.zfill(8)}")
        elif word in words or re.fullmatch(r"step-[0-9]{8,}", word):
            names.append(word)
        else:
            guess = nearest(word, words)
            hint = f"did you mean {guess}?" if guess else "best, latest, previous, snapshots, or a step, with commas"
            raise LumiereError(f"there is no checkpoint {word!a} to keep", hint)
    return tuple(names)


def plan_pruning(run: Run, keep: Collection[str]) -> Pruning:
    """Which checkpoints of a run go where those of `keep`, as `parse_keep` gives them, stay.

    A run is left alone that is not finished, that would have no checkpoint left, or whose checkpoints lie elsewhere,
    behind a link.
    """
    names = checkpoint_names(run)
    kept = [name for name in names if name in keep or (SNAPSHOTS in keep and name.startswith("step-"))]
    gone = tuple(name for name in names if name not in kept)
    if run.status != "finished":
        return Pruning(run, reason=f"it is {run.status}, not finished")
    if run.path.is_symlink() or run.checkpoints_dir.is_symlink():
        return Pruning(run, reason="its checkpoints are behind a link")
    if gone and not kept:
        return Pruning(run, reason="it has none of those to keep")
    paths = [path for name in gone for path in present(run.checkpoints_dir, name)]
    return Pruning(run, gone, disk_bytes(run.path) - disk_bytes(run.path, without=paths))


def prune(pruning: Pruning) -> None:
    """Deletes what `plan_pruning` found.

    Raises:
        LumiereError: the run is running by now, or a checkpoint cannot be deleted.
    """
    run = pruning.run
    check_removable(run)
    with locked(run.path):  # so that no training begins in between
        check_not_elsewhere(run)
        for name in pruning.names:
            try:
                remove(run.checkpoints_dir, name)
            except OSError as error:
                raise LumiereError(
                    f"checkpoint {name} of run {run.id} cannot be deleted: {error.strerror}",
                    f"check the permissions of {run.checkpoints_dir}/",
                ) from error


def distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs in their order, each once, however often and by whatever name it was given."""
    return list(dict.fromkeys(runs))
