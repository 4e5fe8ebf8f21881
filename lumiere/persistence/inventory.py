"""What a run takes on the disk: its checkpoints and its folder. Importing this module loads no torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lumiere.errors import CheckpointError
from lumiere.persistence.checkpoint import read_metadata
from lumiere.persistence.checkpoint_manager import SUFFIX, CheckpointManager
from lumiere.persistence.runs import Run


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint by its header.

    Attributes:
        step: updates that it has seen; None where the header does not say.
        num_bytes: of the file.
        problem: what is wrong with the file, as far as the header shows it.
    """

    name: str
    step: int | None
    num_bytes: int
    problem: str | None


def checkpoint_path(run: Run, name: str) -> Path:
    return run.checkpoints_dir / f"{name}{SUFFIX}"


def checkpoint_files(run: Run) -> list[CheckpointFile]:
    """The checkpoints of a run, in the order of `CheckpointManager.names`; no tensor is read."""
    return [_checkpoint_file(run, name) for name in CheckpointManager(run.path.parent).names(run)]


def disk_bytes(folder: Path, without: Collection[Path] = ()) -> int:
    """Bytes of the files in a folder, those `without` left out; links are not followed.

    A file with several names counts once, and as long as one of them is left: only then its room is taken.
    """
    return sum({(entry.st_dev, entry.st_ino): entry.st_size for entry in _file_stats(folder, without)}.values())


def _checkpoint_file(run: Run, name: str) -> CheckpointFile:
    path = checkpoint_path(run, name)
    try:
        num_bytes = path.stat().st_size
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
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path in without:
                continue
            try:
                yield path.lstat()
            except OSError:  # a training drops files while we look
                continue
