"""List, compare, measure and remove runs. Importing this module loads no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumiere.errors import CheckpointError, LumiereError, nearest
from lumiere.files import locked, sync_folder
from lumiere.persistence.checkpoint import read_metadata
from lumiere.persistence.checkpoint_manager import NAMES, checkpoint_names
from lumiere.persistence.disk import DISK, Disk
from lumiere.persistence.metrics import Point, as_number, last_records, point_of, points_at
from lumiere.persistence.notes import Notes, check_tag, read_notes
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import NAME_PATTERN, Run, RunStore
from lumiere.persistence.step_folders import find, paths_of, remove

STATUSES = ("running", "finished", "interrupted", "failed", "crashed", "unknown")


@dataclass(frozen=True)
class Entry:
    """A run with what its small files say: status, record and notes."""

    run: Run
    status: str
    record: RunRecord
    notes: Notes


def read_entry(run: Run) -> Entry:
    """What the small files of a run say."""
    record = run.record
    # Only a run that is recorded as running can really be something else; for the others one reading is enough.
    status = run.status if record.status == "running" else record.status
    return Entry(run, status, record, read_notes(run))


def _ascending(key: str) -> Callable[[Entry], float]:
    return lambda entry: math.inf if (value := getattr(entry.record, key)) is None else value


def _descending(key: str) -> Callable[[Entry], float]:
    return lambda entry: math.inf if (value := getattr(entry.record, key)) is None else -value


# Unknown values are infinite, and come last in either order. `age` is the order of the store.
SORTS: dict[str, Callable[[Entry], Any]] = {
    "age": lambda entry: 0,
    "loss": _ascending("best_loss"),
    "steps": _descending("step"),
    "parameters": _descending("num_parameters"),
    "name": lambda entry: entry.run.name,
}


def list_runs(
    store: RunStore,
    statuses: Collection[str] = (),
    tags: Collection[str] = (),
    sort: str = "age",
    limit: int | None = None,
) -> list[Entry]:
    """The runs of a store.

    Args:
        statuses: those that are wanted; none stands for all.
        tags: those that a run must have, all of them.
        sort: `age` (newest first), `loss` (lowest best validation loss first), `steps`, `parameters` (most first) or
            `name`. Runs that are equal are newest first; those whose value is not known come last.
        limit: the most runs, after sorting.

    Raises:
        LumiereError: there is no such status or order, a tag is none, or the limit is less than 1.
    """
    for status in statuses:
        _check_word("status", status, STATUSES)
    for tag in tags:
        check_tag(tag)
    _check_word("order", sort, SORTS)
    if limit is not None and limit < 1:
        raise LumiereError(f"the limit must be at least 1, not {limit}", "leave --limit out to list all runs")
    entries = map(read_entry, store.all())
    wanted = [
        entry for entry in entries if (not statuses or entry.status in statuses) and set(tags) <= set(entry.notes.tags)
    ]
    return sorted(wanted, key=SORTS[sort])[:limit]


def _check_word(kind: str, word: str, words: Collection[str]) -> None:
    if word not in words:
        guess = nearest(word, words)
        hint = f"did you mean {guess}?" if guess else f"one of {', '.join(words)}"
        raise LumiereError(f"there is no {kind} {word!a}", hint)


@dataclass(frozen=True)
class Reached:
    """How far one run came.

    Attributes:
        training, evaluation: the last line of each kind in its metrics; empty where there is none.
        training_at, validation_at: its last losses at or before the comparison's `common_tokens`.
    """

    entry: Entry
    training: dict[str, Any]
    evaluation: dict[str, Any]
    training_at: Point | None
    validation_at: Point | None

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole training, evaluating and saving left out; by its last line of metrics."""
        tokens, seconds = as_number(self.training.get("tokens")), as_number(self.training.get("time"))
        return tokens / seconds if tokens is not None and seconds else None


@dataclass(frozen=True)
class Comparison:
    """Several runs.

    Attributes:
        differences: by dotted key, the value in each run; only keys whose values are not all equal.
        common_tokens: as many tokens as every run has an evaluation at or before: the fewest among their last
            evaluations. None where a run was never evaluated. Losses there are measured ones, never interpolated:
            where runs are evaluated at other steps, the tokens that stand beside each loss tell how far they are apart.
        same_corpus: whether the losses are over the same tokens; None where a run does not say.
    """

    runs: tuple[Reached, ...]
    differences: dict[str, tuple[Any, ...]]
    common_tokens: int | None
    same_corpus: bool | None


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs.

    Raises:
        LumiereError: there are fewer than two, or a run's config cannot be read.
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
    """A run's config by dotted keys, in the order of the schema, as JSON values.

    What this version refuses stands there as text, so that runs of other versions can be looked at; a key that such a
    run does not have stands there with its default.

    Raises:
        ConfigError: there is no config, or it is no YAML.
    """
    from lumiere.config.loader import read_config, read_value

    found = flatten(read_config(run.config_path))
    return default_values() | {key: _plain(read_value(key, value)) for key, value in found.items()}


def default_values() -> dict[str, Any]:
    """The default of every setting, by dotted key."""
    from lumiere.config.schema import RunConfig

    return flatten(RunConfig().model_dump())


def changed_values(run: Run) -> dict[str, tuple[Any, Any]]:
    """The settings of a run that are not the default: value and default by dotted key.

    Raises:
        ConfigError: as `config_values`.
    """
    defaults = default_values()
    pairs = {key: (value, defaults.get(key)) for key, value in config_values(run).items()}
    return {key: pair for key, pair in pairs.items() if not _equal(*pair)}


def flatten(config: dict[Any, Any]) -> dict[str, Any]:
    """`{"model": {"dropout": 0.1}}` as `{"model.dropout": 0.1}`; what is deeper is one value."""
    flat = {}
    for section, values in config.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": _plain(value) for key, value in values.items()}
        else:
            flat[str(section)] = _plain(values)
    return flat


def _plain(value: Any) -> Any:
    """`value` as JSON has it: YAML also knows dates and sets."""
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
    # Python takes True for 1.
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
    return [_checkpoint_file(run, name) for name in checkpoint_names(run)]


def disk_bytes(folder: Path, without: Collection[Path] = ()) -> int:
    """Bytes of the files in a folder, without those files and folders in it; links are not followed.

    A file with several names counts once, and as long as one of them is left: only then its room is taken.
    """
    return sum({(entry.st_dev, entry.st_ino): entry.st_size for entry in _file_stats(folder, without)}.values())


def _checkpoint_file(run: Run, name: str) -> CheckpointFile:
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
        for name in names:
            path = Path(parent, name)
            if path in without:
                continue
            try:
                yield path.lstat()
            except OSError:  # a training drops files while we look
                continue


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
        raise run.busy(run.record)


def remove_run(run: Run, disk: Disk = DISK) -> None:
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
            run.check_not_elsewhere()
            os.rename(run.path, aside)
        sync_folder(run.path.parent)
        disk.remove(aside)
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
                DISK.remove(store.runs_dir / name)
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
    paths = paths_of(run.checkpoints_dir, gone)
    return Pruning(run, gone, disk_bytes(run.path) - disk_bytes(run.path, without=paths))


def prune(pruning: Pruning) -> None:
    """Deletes what `plan_pruning` found.

    Raises:
        LumiereError: the run is running by now, or a checkpoint cannot be deleted.
    """
    run = pruning.run
    check_removable(run)
    with locked(run.path):  # so that no training begins in between
        run.check_not_elsewhere()
        try:
            remove(run.checkpoints_dir, pruning.names)
        except OSError as error:
            raise LumiereError(
                f"checkpoints of run {run.id} cannot be deleted: {error.strerror}",
                f"check the permissions of {run.checkpoints_dir}/",
            ) from error


def distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs in their order, each once, however often and by whatever name it was given."""
    return list(dict.fromkeys(runs))
