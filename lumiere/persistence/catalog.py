"""List, compare, measure and remove runs. Importing this module loads no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumiere.errors import CheckpointError, LumiereError, check_choice, nearest
from lumiere.files import locked
from lumiere.persistence.metrics import Point, as_number, last_records, point_of, points_at
from lumiere.persistence.notes import Notes, check_tag, read_notes
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import NAME_PATTERN, Run, RunStore

STATUSES = ("running", "finished", "interrupted", "failed", "crashed", "imported", "unknown")


@dataclass(frozen=True)
class Entry:
    """A run with what its small files say: status, record and notes."""

    run: Run
    status: str
    record: RunRecord
    notes: Notes


def read_entry(run: Run) -> Entry:
    """Read the small files of a run."""
    record = run.record
    # Only a run recorded as running can have another status; for the others one read suffices.
    status = run.status if record.status == "running" else record.status
    return Entry(run, status, record, read_notes(run))


SORTS: dict[str, Callable[[Entry], Any]] = {
    "age": lambda entry: 0,  # the order of the store
    "loss": lambda entry: _unknown_last(entry.record.best_loss, 1),
    "steps": lambda entry: _unknown_last(entry.record.step, -1),
    "parameters": lambda entry: _unknown_last(entry.record.num_parameters, -1),
    "name": lambda entry: entry.run.name,
}


def _unknown_last(value: float | None, sign: int) -> float:
    return math.inf if value is None else sign * value


def list_runs(
    store: RunStore,
    statuses: Collection[str] = (),
    tags: Collection[str] = (),
    sort: str = "age",
    limit: int | None = None,
) -> list[Entry]:
    """Return the runs of a store.

    Args:
        statuses: Statuses to include. Default: all.
        tags: Tags that a run must have, all of them.
        sort: `age` (newest first), `loss` (lowest best validation loss first), `steps`, `parameters` (most first) or
            `name`. Equal runs are newest first; unknown values come last.
        limit: Maximum number of runs, after sorting.

    Raises:
        LumiereError: The status or order does not exist, a tag is invalid, or the limit is less than 1.
    """
    for status in statuses:
        check_choice("status", status, STATUSES)
    for tag in tags:
        check_tag(tag)
    check_choice("order", sort, SORTS)
    if limit is not None and limit < 1:
        raise LumiereError(f"the limit must be at least 1, not {limit}", "leave --limit out to list all runs")
    entries = map(read_entry, store.all())
    wanted = [
        entry for entry in entries if (not statuses or entry.status in statuses) and set(tags) <= set(entry.notes.tags)
    ]
    return sorted(wanted, key=SORTS[sort])[:limit]


@dataclass(frozen=True)
class Reached:
    """The progress of one run.

    Attributes:
        training, evaluation: The last record of each kind in its metrics; empty if there is none.
        training_at, validation_at: Its last losses at or before the comparison's `common_tokens`.
    """

    entry: Entry
    training: dict[str, Any]
    evaluation: dict[str, Any]
    training_at: Point | None
    validation_at: Point | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole run, without evaluation and saving, by its last training record."""
        tokens, seconds = as_number(self.training.get("tokens")), as_number(self.training.get("time"))
        return tokens / seconds if tokens is not None and seconds else None


@dataclass(frozen=True)
class Comparison:
    """Several runs.

    Attributes:
        differences: The value in each run by dotted key, for keys whose values are not all equal.
        common_tokens: The smallest number of tokens among the runs' last evaluations, so that every run has a loss at
            or before it. None if a run was never evaluated. Losses are measured, never interpolated; the tokens beside
            each loss show how far apart they are.
        same_corpus: Whether the losses are over the same tokens; None if a run does not record it.
    """

    runs: tuple[Reached, ...]
    differences: dict[str, tuple[Any, ...]]
    common_tokens: int | None
    same_corpus: bool | None


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs.

    Raises:
        LumiereError: There are fewer than two, or a run's config cannot be read.
    """
    if len(set(runs)) < 2:
        raise LumiereError("a comparison needs two runs or more", "for example lumiere runs compare a6jz dkxc")
    configs = [config_values(run) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: tuple(config.get(key) for config in configs) for key in keys}
    differences = {key: row for key, row in rows.items() if not all(_equal(row[0], value) for value in row)}
    lasts = [last_records(run.metrics_path) for run in runs]
    ends = [point_of(evaluation, "val_loss") for _, evaluation in lasts]
    common = min((end.tokens for end in ends if end), default=None) if all(ends) else None
    reached = []
    for run, (training, evaluation) in zip(runs, lasts, strict=True):
        at = (None, None) if common is None else points_at(run.metrics_path, common)
        reached.append(Reached(read_entry(run), training, evaluation, *at))
    corpora = [item.entry.record.corpus_sha256 for item in reached]
    same = None if None in corpora else all(corpus == corpora[0] for corpus in corpora)
    return Comparison(tuple(reached), differences, common, same)


def config_values(run: Run) -> dict[str, Any]:
    """Return a run's config by dotted keys, in the order of the schema, as JSON values.

    Runs of other versions can be read: values that this version refuses are text, and missing keys have their default.

    Raises:
        ConfigError: There is no config, or it is not YAML.
    """
    from lumiere.config.loader import read_config, read_value

    found = flatten(read_config(run.config_path))
    return default_values() | {key: _plain(read_value(key, value)) for key, value in found.items()}


def default_values() -> dict[str, Any]:
    """Return the default of every setting by dotted key."""
    from lumiere.config.schema import RunConfig

    return flatten(RunConfig().model_dump())


def changed_values(run: Run) -> dict[str, tuple[Any, Any]]:
    """Return the settings of a run that differ from the default: value and default by dotted key.

    Raises:
        ConfigError: As `config_values`.
    """
    defaults = default_values()
    pairs = {key: (value, defaults.get(key)) for key, value in config_values(run).items()}
    return {key: pair for key, pair in pairs.items() if not _equal(*pair)}


def flatten(config: dict[Any, Any]) -> dict[str, Any]:
    """Return `{"model": {"dropout": 0.1}}` as `{"model.dropout": 0.1}`; deeper levels stay one value."""
    flat = {}
    for section, values in config.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": _plain(value) for key, value in values.items()}
        else:
            flat[str(section)] = _plain(values)
    return flat


def _plain(value: Any) -> Any:
    """Return `value` as a JSON value: YAML also has dates and sets."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case _:
            return str(value)


def _equal(a: Any, b: Any) -> bool:
    # True == 1 in Python.
    return a == b and isinstance(a, bool) == isinstance(b, bool)


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint, as far as its manifest or header shows it.

    Attributes:
        step: Updates that it has seen; None if it does not state them.
        num_bytes: Size of its file, or of all files in its folder.
        problem: What is wrong with it; None if nothing.
    """

    name: str
    step: int | None
    num_bytes: int
    problem: str | None


def checkpoint_files(run: Run) -> list[CheckpointFile]:
    """Return the checkpoints of a run, in the order of `CheckpointManager.names`; no tensor is read."""
    from lumiere.persistence.step_folders import checkpoint_names

    return [_checkpoint_file(run, name) for name in checkpoint_names(run.checkpoints_dir)]


def disk_bytes(folder: Path, without: Collection[Path] = ()) -> int:
    """Return the bytes of the files in a folder, except those in `without`; links are not followed.

    A file with several names counts once, unless `without` has all of them.
    """
    return sum({(entry.st_dev, entry.st_ino): entry.st_size for entry in _file_stats(folder, without)}.values())


def _checkpoint_file(run: Run, name: str) -> CheckpointFile:
    from lumiere.persistence.checkpoint import read_metadata
    from lumiere.persistence.step_folders import find

    path = find(run.checkpoints_dir, name) or run.checkpoints_dir / name
    try:
        num_bytes = disk_bytes(path) if path.is_dir() else path.stat().st_size
    except OSError:  # training has just replaced or removed it
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
        for path in (Path(parent, name) for name in names):
            with suppress(OSError):  # training removes files meanwhile
                if path not in without:
                    yield path.lstat()


ASIDE_PATTERN = re.compile(rf"\.removed\.{NAME_PATTERN.pattern}\.[0-9a-f]{{8}}")


@dataclass(frozen=True)
class Pruning:
    """What to delete of one run.

    Attributes:
        names: Checkpoints to delete; empty if the run is skipped.
        num_bytes: Bytes that this frees.
        reason: Why the run is skipped.
    """

    run: Run
    names: tuple[str, ...] = ()
    num_bytes: int = 0
    reason: str | None = None


def check_removable(run: Run) -> None:
    """Check that a run is not being trained.

    Raises:
        RunBusyError: Its status is running.
    """
    if run.status == "running":
        raise run.busy(run.record)


def remove_run(run: Run) -> None:
    """Delete a run; if it is a link, delete the link.

    The folder is first renamed to a name that is not a run's, so that a kill leaves no half run; `remove_leftovers`
    deletes the rest.

    Raises:
        LumiereError: It is running, or cannot be deleted.
    """
    import secrets

    check_removable(run)
    aside = run.path.with_name(f".removed.{run.name}.{secrets.token_hex(4)}")
    try:
        with locked(run.path):  # so that no training starts meanwhile
            run.check_not_elsewhere()
            run.disk.rename(run.path, aside)
        run.disk.remove(aside)
    except OSError as error:
        raise LumiereError(
            f"run {run.id} cannot be removed: {error.strerror or error}", f"check the permissions of {run.path.parent}/"
        ) from error


def remove_leftovers(store: RunStore) -> None:
    """Delete what a killed `remove_run` left; what cannot be deleted stays for the next time."""
    for path in store.runs_dir.glob(".removed.*"):
        if ASIDE_PATTERN.fullmatch(path.name):
            with suppress(OSError):
                store.disk.remove(path)


def parse_keep(keep: str) -> tuple[str, ...]:
    """Parse `best,latest,512` as names of checkpoints; `snapshots` means all of them.

    Raises:
        LumiereError: A word is neither a checkpoint nor a step.
    """
    from lumiere.persistence.step_folders import NAMES, SNAPSHOTS

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
    """Plan to delete the checkpoints of a run except `keep`, from `parse_keep`.

    Runs that are not finished, that would have no checkpoint left, or whose checkpoints are behind a link are skipped.
    """
    from lumiere.persistence.step_folders import SNAPSHOTS, checkpoint_names, paths_of

    names = checkpoint_names(run.checkpoints_dir)
    kept = [name for name in names if name in keep or (SNAPSHOTS in keep and name.startswith("step-"))]
    gone = tuple(name for name in names if name not in kept)
    if run.status != "finished":
        return Pruning(run, reason=f"it is {run.status}, not finished")
    if run.path.is_symlink() or run.checkpoints_dir.is_symlink():
        return Pruning(run, reason="its checkpoints are behind a link")
    if gone and not kept:
        return Pruning(run, reason="it has none of those to keep")
    paths = paths_of(run.checkpoints_dir, gone)
    return Pruning(run, gone, disk_bytes(run.path) - disk_bytes(run.path, without=paths))


def prune(pruning: Pruning) -> None:
    """Delete what `plan_pruning` found.

    Raises:
        LumiereError: The run is running by now, or a checkpoint cannot be deleted.
    """
    from lumiere.persistence.checkpoint_manager import CheckpointManager

    run = pruning.run
    check_removable(run)
    with locked(run.path):  # so that no training starts meanwhile
        run.check_not_elsewhere()
        CheckpointManager().remove(run, *pruning.names)
