"""Push runs to another place, and pull them from there.

A run at another place has the same files as here, and `transfer.json`, which lists them. A push writes new files first,
then removes the old list, replaces what has changed, and writes the new list last; what has arrived is kept in
`transfer.unfinished.json`, so that a repeated push goes on. A pull fetches into `.pulling.<run>` in the runs directory,
which is no run, and renames it when every hash is right; a repeated pull goes on. Credentials are never written.
Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lumiere.errors import LumiereError, RunBusyError, RunNotFoundError, TransferError
from lumiere.files import LOCK_NAME, Disk, locked, open_file, read_file, writing
from lumiere.persistence import lenses, notes, step_folders
from lumiere.persistence.listing import (
    CHECKPOINTS,
    LISTING_NAME,
    MAX_LISTING_BYTES,
    POINTERS,
    ROOT_NAMES,
    Entry,
    Listing,
    checkpoint_path,
    choose,
    damaged,
    is_known,
    parse_listing,
)
from lumiere.persistence.manifest import hash_file
from lumiere.persistence.metrics import to_json, whole_bytes
from lumiere.persistence.places import CHUNK_BYTES, Folder, Place, open_place
from lumiere.persistence.runs import MAX_RECORD_BYTES, Run, RunStore, is_run_name

UNFINISHED_NAME = "transfer.unfinished.json"
SECONDS_BETWEEN_NOTES = 20.0
"""How often a push notes what has arrived; on the Hugging Face Hub each time is a commit."""
MAX_TRIES = 20
"""How often a push looks for a moment at which training does not replace checkpoints."""
MAX_NAMES = 5  # in a message
HINT = "make room or check the folder"


class Progress(NamedTuple):
    """How far a stage, `reading`, `sending` or `fetching`, is, in bytes."""

    stage: str
    done: int
    total: int


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Transfer:
    """A finished transfer.

    Attributes:
        run: Full name of the run.
        address: The other place, without credentials.
        checkpoints: Names of the checkpoints that were asked for.
        num_files, num_bytes: All that was asked for.
        moved_files, moved_bytes: What was not there yet.
    """

    run: str
    address: str
    checkpoints: tuple[str, ...]
    num_files: int
    num_bytes: int
    moved_files: int
    moved_bytes: int


class Source(NamedTuple):
    """A file to push: its contents, or its path and how many bytes of it."""

    path: Path
    bytes: int
    data: bytes | None = None

    def chunks(self) -> Iterator[bytes]:
        """Yield the contents; fewer bytes if the file has become shorter."""
        if self.data is not None:
            yield self.data
            return
        with open_file(self.path) as file:
            left = self.bytes
            while chunk := file.read(min(left, CHUNK_BYTES)):
                left -= len(chunk)
                yield chunk


def push(run: Run, url: str, checkpoints: Collection[str] = (), report: Report = lambda progress: None) -> Transfer:
    """Copy a run to another place. What is there already is skipped; what else is there of the run stays.

    A run that is being trained is pushed as it was at one moment: with the checkpoints that `pointers.json` named,
    complete lines of metrics, and the status `interrupted`.

    Args:
        url: The place, a path or a URL that `fsspec` knows; the run gets a folder of its name there.
        checkpoints: Names or steps; `snapshots` are all of these. Default: all checkpoints.

    Raises:
        LumiereError: A checkpoint does not exist, or the place cannot be reached or written to.
    """
    place = open_place(url)
    if isinstance(place, Folder) and _is_same(place.path / run.name, run.path):
        raise LumiereError(f"{place.address} is the folder that run {run.id} is in", "push it to another place")
    with _frozen(run, checkpoints) as (paths, sources):
        total, done, files = sum(source.bytes for source in sources.values()), 0, {}
        for name, source in sources.items():
            digest, length = hashlib.sha256(), 0
            for chunk in _read(source):
                digest.update(chunk)
                length += len(chunk)
                report(Progress("reading", done + length, total))
            files[name] = Entry(name, length, digest.hexdigest())
            done += length
        return _send(place, Listing(run.name, paths, files), sources, report)


def _send(place: Place, ours: Listing, sources: Mapping[str, Source], report: Report) -> Transfer:
    """Write what is not there yet, then the listing of everything that is there."""
    run = ours.run
    lengths = place.sizes(run)
    theirs, unfinished = _listing_there(place, run, LISTING_NAME), _listing_there(place, run, UNFINISHED_NAME)
    arrived = {
        name: entry for name, entry in {**theirs.files, **unfinished.files}.items() if lengths.get(name) == entry.bytes
    }
    target = _merged(ours, theirs, arrived)
    missing = [entry for name, entry in ours.files.items() if arrived.get(name) != entry]
    done, total = 0, sum(entry.bytes for entry in missing)
    if missing or target != theirs or LISTING_NAME not in lengths or UNFINISHED_NAME in lengths:
        noted = time.monotonic()

        def note() -> None:
            place.write(f"{run}/{UNFINISHED_NAME}", [Listing(run, {}, arrived).to_bytes()])

        try:
            # Files of other names leave the old listing valid.
            for entry in sorted(missing, key=lambda entry: entry.name in theirs.files):
                if entry.name in theirs.files and LISTING_NAME in lengths:
                    note()
                    place.remove(f"{run}/{LISTING_NAME}")
                    del lengths[LISTING_NAME]
                arrived.pop(entry.name, None)
                place.write(f"{run}/{entry.name}", _checked(sources[entry.name], entry, done, total, report))
                arrived[entry.name] = entry
                done += entry.bytes
                if time.monotonic() - noted > SECONDS_BETWEEN_NOTES:
                    note()
                    noted = time.monotonic()
            if (pointers := target.pointers()) is not None:
                place.write(f"{run}/{POINTERS}", [pointers])
            place.write(f"{run}/{LISTING_NAME}", [target.to_bytes()])
        except BaseException:
            if arrived != unfinished.files:
                with suppress(LumiereError):
                    note()
            raise
        for name in {*theirs.files, *unfinished.files} - target.files.keys():
            place.remove(f"{run}/{name}")
        place.remove(f"{run}/{UNFINISHED_NAME}")
    return _transfer(place, ours, missing)


def _merged(ours: Listing, theirs: Listing, arrived: Mapping[str, Entry]) -> Listing:
    """Return what is at a place after a push: ours, and what is whole there and still part of the run."""
    mine = set(ours.checkpoints.values())
    lost = {checkpoint_path(name) for name in theirs.files.keys() - arrived.keys()}
    kept = {name: path for name, path in theirs.checkpoints.items() if path not in lost - mine}
    checkpoints = {**kept, **ours.checkpoints}
    paths = set(checkpoints.values()) - mine
    files = {name: entry for name, entry in arrived.items() if checkpoint_path(name) in {None, *paths}}
    return Listing(ours.run, checkpoints, {**files, **ours.files})


def _checked(source: Source, entry: Entry, done: int, total: int, report: Report) -> Iterator[bytes]:
    """Yield the contents of a file, which must be those of the entry."""
    digest, length = hashlib.sha256(), 0
    for chunk in _read(source):
        digest.update(chunk)
        length += len(chunk)
        yield chunk
        report(Progress("sending", done + length, total))
    if (length, digest.hexdigest()) != (entry.bytes, entry.sha256):
        raise LumiereError(f"{entry.name} changed while it was pushed", "run the command again: it continues")


def _read(source: Source) -> Iterator[bytes]:
    try:
        yield from source.chunks()
    except OSError as error:
        raise LumiereError(
            f"{str(source.path)!r} cannot be read: {error.strerror or error}", "run the command again: it continues"
        ) from error


def _listing_there(place: Place, run: str, name: str) -> Listing:
    """Return a listing at a place; an empty one if it does not exist or is damaged."""
    try:
        return _read_listing(place, run, name)
    except (FileNotFoundError, TransferError):
        return Listing(run)


def _read_listing(place: Place, run: str, name: str = LISTING_NAME) -> Listing:
    data, where = bytearray(), f"{run} in {place.address}"
    for chunk in place.read(f"{run}/{name}"):
        data += chunk
        if len(data) > MAX_LISTING_BYTES:
            raise damaged(where, f"{name} is longer than {MAX_LISTING_BYTES:,} bytes")
    return parse_listing(bytes(data), run, where, is_whole=name == LISTING_NAME)


def _transfer(place: Place, listing: Listing, missing: Collection[Entry]) -> Transfer:
    return Transfer(
        listing.run,
        place.address,
        tuple(listing.checkpoints),
        len(listing.files),
        sum(entry.bytes for entry in listing.files.values()),
        len(missing),
        sum(entry.bytes for entry in missing),
    )


@contextmanager
def _frozen(run: Run, wanted: Collection[str]) -> Iterator[tuple[dict[str, str], dict[str, Source]]]:
    """Yield the paths of the wanted checkpoints and the files of a run, as they are at one moment.

    Training removes the checkpoints that it replaces, so those of a run that is being trained get a second name.
    """
    with ExitStack() as stack:
        staging = None
        if run.status == "running":
            staging = stack.enter_context(_workspace(run.path.with_name(f".pushing.{run.name}"), "pushed", run.disk))
            stack.callback(run.disk.remove, staging)
        for _ in range(MAX_TRIES):
            try:
                pointers = step_folders.read_pointers(run.checkpoints_dir)
                checkpoints = _checkpoint_files(run, wanted)
                if staging is not None:
                    checkpoints = {name: _linked(*pair, staging, run.disk) for name, pair in checkpoints.items()}
                files = _other_files(run)
            except OSError as error:
                if staging is not None and isinstance(error, FileNotFoundError):
                    continue  # training has just removed it
                raise LumiereError(
                    f"{str(error.filename or run.path)!r} cannot be read: {error.strerror or error}",
                    f"check {run.path}/",
                ) from error
            if step_folders.read_pointers(run.checkpoints_dir) == pointers:
                break
        else:
            raise LumiereError(f"run {run.id} is changing", "run the command again")
        for path, sources in checkpoints.values():
            files |= {f"{CHECKPOINTS}/{path}{rest}": source for rest, source in sources.items()}
        files = {name: source for name, source in files.items() if is_known(name)}
        if link := next((name for name, source in files.items() if source.path.is_symlink()), None):
            raise LumiereError(f"{link} of run {run.id} is a link", "put the file itself there")
        yield {name: path for name, (path, _) in checkpoints.items()}, files


def _checkpoint_files(run: Run, wanted: Collection[str]) -> dict[str, tuple[str, dict[str, Source]]]:
    """Return the path below `checkpoints` of each wanted checkpoint, with its files by what follows that path."""
    found = {}
    for name in choose(f"run {run.id}", step_folders.checkpoint_names(run.checkpoints_dir), wanted):
        place = step_folders.find(run.checkpoints_dir, name)
        if place is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        # A kill of an old Lumiere may have left it under the name `.best.old`.
        path = re.sub(r"^\.(.+)\.old", r"\1", place.relative_to(run.checkpoints_dir).as_posix())
        paths = {"": place}
        if place.is_dir():
            paths = {f"/{file.name}": file for file in sorted(place.iterdir()) if not file.name.startswith(".")}
        found[name] = path, {rest: Source(file, file.stat().st_size) for rest, file in paths.items()}
    return found


def _linked(path: str, sources: dict[str, Source], staging: Path, disk: Disk) -> tuple[str, dict[str, Source]]:
    """Return a checkpoint whose files are in the staging folder too."""
    folder = staging / path
    if folder.exists():
        disk.remove(folder)  # of an earlier try
    linked = {rest: source._replace(path=folder / (rest.strip("/") or "file")) for rest, source in sources.items()}
    disk.make_folder(folder)
    for rest, source in sources.items():
        disk.link(source.path, linked[rest].path)
    return path, linked


def _other_files(run: Run) -> dict[str, Source]:
    """Return the files of a run that belong to no checkpoint."""
    found = {}
    evaluations = [f"{notes.FOLDER}/{name}" for name in _names(run.path / notes.FOLDER) if name.endswith(notes.SUFFIX)]
    kept_lenses = [f"{lenses.FOLDER}/{name}" for name in lenses.lens_names(run)]
    for name in (*ROOT_NAMES, *evaluations, *kept_lenses):
        path = run.path / name
        if not path.exists():
            continue
        if path == run.metrics_path:
            found[name] = Source(path, whole_bytes(path))
        elif path == run.record_path:
            # At the other place nothing trains it.
            data = read_file(path, MAX_RECORD_BYTES)
            if run.record.status == "running":
                data = (to_json({**run.record.values, "status": "interrupted"}, indent=2) + "\n").encode()
            found[name] = Source(path, len(data), data)
        else:
            found[name] = Source(path, path.stat().st_size)
    return found


def pull(
    store: RunStore,
    url: str,
    reference: str | None = None,
    checkpoints: Collection[str] = (),
    report: Report = lambda progress: None,
) -> Transfer:
    """Copy a run from another place into a runs directory. Nothing is fetched if it is here already.

    Args:
        url: The place as in `push`, or the folder of one run there.
        reference: Name, id, unique start of an id, or `latest`. Default: the only run there.
        checkpoints: As in `push`.

    Raises:
        RunNotFoundError: There is no such run, or several.
        TransferError: What is there is damaged, or no run; nothing of it is kept.
        LumiereError: The place cannot be read, or the runs directory written to; or another run with that id is here.
    """
    last = url.rstrip("/").rpartition("/")[2]
    if reference is None and is_run_name(last):
        url, reference = url.rstrip("/").removesuffix(last) or ".", last
    place = open_place(url)
    run = _find(place, reference)
    try:
        listing = _read_listing(place, run)
    except FileNotFoundError:
        raise RunNotFoundError(
            f"{place.address} has no complete run {run}", "push it first; repeating an interrupted push continues it"
        ) from None
    listing = listing.only(checkpoints)
    for other in store.all():
        if other.id == Run(Path(run)).id:
            _check_identical(other, listing)
            return _transfer(place, listing, [])
    with writing(store.runs_dir, HINT):
        store.make_folder()
    temporary = store.runs_dir / f".pulling.{run}"
    with _workspace(temporary, "pulled", store.disk):
        try:
            missing = _fetch(place, listing, temporary, store.disk, report)
        except LumiereError as error:
            if isinstance(error, TransferError) or _files_below(temporary) == [LOCK_NAME]:
                store.disk.remove(temporary)
            raise
        with writing(temporary, HINT):
            _complete(listing, temporary, store.disk)
            store.disk.rename(temporary, store.runs_dir / run)
    return _transfer(place, listing, missing)


def _find(place: Place, reference: str | None) -> str:
    """Return the full name of a run at a place."""
    if reference is not None and is_run_name(reference):
        return reference
    runs = sorted(filter(is_run_name, place.names()), key=lambda name: name.split("_", 2)[2], reverse=True)
    if reference == "latest":
        found = runs[:1]
    else:
        found = [name for name in runs if reference is None or (reference and Run(Path(name)).id.startswith(reference))]
    if len(found) == 1:
        return found[0]
    if not found:
        what = "runs" if reference is None else f"run {reference!r}"
        raise RunNotFoundError(f"{place.address} has no {what}", f"it has {_some(runs)}" if runs else "push one first")
    raise RunNotFoundError(
        f"{place.address} has {len(found)} such runs: {_some(found)}", "name one of them after the URL"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def _fetch(place: Place, listing: Listing, folder: Path, disk: Disk, report: Report) -> list[Entry]:
    """Make all files of the listing, and no others, in a folder; return those that were not there."""
    with writing(folder, HINT):
        for name in _files_below(folder):
            entry = listing.files.get(name)
            if name != LOCK_NAME and not (entry and _has(folder / name, entry)):
                disk.remove(folder / name)
        missing = [entry for name, entry in listing.files.items() if not (folder / name).exists()]
        total, done = sum(entry.bytes for entry in missing), 0
        disk.check_room(folder, total)
    where = f"{listing.run} in {place.address}"
    for entry in missing:
        path, digest, length = folder / entry.name, hashlib.sha256(), 0
        try:
            with writing(path, HINT):
                disk.make_folder(path.parent, exist_ok=True)
                with disk.new_file(path) as file:
                    for chunk in _chunks(place, f"{listing.run}/{entry.name}", where):
                        length += len(chunk)
                        if length > entry.bytes:
                            break
                        digest.update(chunk)
                        file.write(chunk)
                        report(Progress("fetching", done + length, total))
            if length != entry.bytes:
                raise damaged(
                    where, f"{entry.name} has {'more' if length > entry.bytes else 'fewer'} bytes than listed"
                )
            if digest.hexdigest() != entry.sha256:
                raise damaged(where, f"{entry.name} does not match its hash")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        done += length
    return missing


def _chunks(place: Place, path: str, where: str) -> Iterator[bytes]:
    try:
        yield from place.read(path)
    except FileNotFoundError:
        raise damaged(where, f"{path.partition('/')[2]} is missing") from None


def _complete(listing: Listing, folder: Path, disk: Disk) -> None:
    """Write the pointers to the checkpoints, and make all names durable."""
    disk.make_folder(folder / CHECKPOINTS, exist_ok=True)
    if (pointers := listing.pointers()) is not None:
        disk.write(folder / POINTERS, pointers)
    for path in (*folder.rglob("*"), folder):
        disk.sync(path)


def _check_identical(run: Run, listing: Listing) -> None:
    """Check that a run here has the same files as the listing.

    Raises:
        LumiereError: It has not.
    """
    differing = [name for name, entry in listing.files.items() if not _has(run.path / name, entry)]
    pointers = step_folders.read_pointers(run.checkpoints_dir)
    differing += [name for name, path in json.loads(listing.pointers() or b"{}").items() if pointers.get(name) != path]
    if run.name != listing.run or differing:
        difference = f"its {differing[0]} is not the same" if differing else f"it is {run.name}"
        raise LumiereError(
            f"run {run.id} is in {run.path.parent}/ already, and {difference}",
            f"pull into another folder with --runs-dir, or delete it: {run.command('runs', 'rm', run.id)}",
        )


def _has(path: Path, entry: Entry) -> bool:
    """Return whether a file has the length and the hash of an entry."""
    try:
        if path.is_symlink() or path.stat().st_size != entry.bytes:
            return False
        with open_file(path) as file:
            return hash_file(file) == entry.sha256
    except OSError:
        return False


@contextmanager
def _workspace(folder: Path, action: str, disk: Disk) -> Iterator[Path]:
    """Make a folder that a killed process may have left, and keep other processes out of it."""
    with writing(folder, HINT):
        disk.make_folder(folder, exist_ok=True)
    try:
        with locked(folder):
            yield folder
    except RunBusyError:
        name = folder.name.split(".")[-1]
        raise RunBusyError(f"{name} is being {action} by another process", "wait for it to end, or stop it") from None


def _files_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []


def _is_same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)
