"""What a run takes on the disk: its checkpoints and its folder. Importing this module loads no torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lumiere.errors import CheckpointError
from lumiere.persistence.checkpoint import read_metadata
from lumiere.persistence.checkpoint_names import checkpoint_names
from lumiere.persistence.placing import find
from lumiere.persistence.runs import Run


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint, a file or a folder, by its header or its manifest.

    Attributes:
        step: updates that it has seen; None where the header does not say.
        num_bytes: of the file, or of all files in the folder.
        problem: what is wrong with it, as far as the header or the manifest shows it.
    """

    name: str
    step: int | None
    num_bytes: int
    problem: str | None


def checkpoint_path(run: Run, name: str) -> Path:
    """The file or folder that the checkpoint is; where it is not there, the file that it would be."""
    return find(run.checkpoints_dir, name)


def checkpoint_files(run: Run) -> list[CheckpointFile]:
    """The checkpoints of a run, in the order of `CheckpointManager.names`; no tensor is read."""
    return [_checkpoint_file(run, name) for name in checkpoint_names(run)]


def disk_bytes(folder: Path, without: Collection[Path] = ()) -> int:
    """Bytes of the files in a folder, without those files and folders in it; links are not followed.

    A file with several names counts once, and as long as one of them is left: only then its room is taken.
    """
    return sum({(entry.st_dev, entry.st_ino): entry.st_size for entry in _file_stats(folder, without)}.values())


def _checkpoint_file(run: Run, name: str) -> CheckpointFile:
    path = checkpoint_path(run, name)
    try:
        num_bytes = disk_bytes(path) if path.is_dir() else path.stat().st_size
    except OSError:  # a training has just replaced or dropped it
        num_bytes = 0
    try:
        step = read_metadata(path).get("step")
    except CheckpointError as error:
        return CheckpointFile(name, None, num_bytes, error.message)
    return CheckpointFile(name, step if isinstance(step, int) else None, num_bytes, None)


def _file_stats(folder: Path, without: Collection[Path]) -> Iterator[os.stat_result]:
    if folder.is_symlink():
        return
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) not in without]
        for name in names:
            path = Path(parent, name)
            if path in without:
                continue
            try:
                yield path.lstat()
            except OSError:  # a training drops files while we look
                continue
