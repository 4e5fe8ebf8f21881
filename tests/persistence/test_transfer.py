"""Runs that travel arrive byte for byte, are never half there, and bring nothing that is not part of a run."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumiere.errors import CheckpointError, LumiereError, RunBusyError, RunNotFoundError, TransferError
from lumiere.files import Disk, locked
from lumiere.persistence import transfer
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.listing import LISTING_NAME, POINTERS
from lumiere.persistence.liveness import this_process
from lumiere.persistence.notes import add_tags, save_evaluation
from lumiere.persistence.runs import Run, RunStore
from lumiere.persistence.transfer import UNFINISHED_NAME, Progress, pull, push
from tests.checkpoints import checkpoint, copy_fixture
from tests.persistence.disks import StrictDisk

METRICS = b'{"step": 1, "loss": 5.5}\n{"step": 2, "loss": 5.25}\n'
NOT_COPIED = (".lock", "tensorboard")


def make(store: RunStore, status: str = "finished", last_step: int = 2) -> Run:
    """A run with three checkpoints, two snapshots, and files that are no part of it."""
    run = store.create()
    run.update(status=status, step=last_step, **this_process())
    (run.path / "config.yaml").write_text("training: {seed: 1}\n")
    run.tokenizer_path.write_bytes(os.urandom(3000))
    run.metrics_path.write_bytes(METRICS)
    add_tags(run, ["kept"])
    save_evaluation(run, "best-text-0a1b2c3d-windows", {"loss": 5.0})
    (run.path / "tensorboard").mkdir()
    (run.path / "tensorboard" / "events").write_text("not copied")
    manager = CheckpointManager()
    for step in (0, 1):
        manager.save(run, f"step-{step:08d}", checkpoint(step))
    manager.save(run, ["best", "latest"], checkpoint(1))
    manager.save(run, "latest", checkpoint(last_step))
    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk would take most of the time."""
    monkeypatch.setattr(Disk, "fsync", lambda disk, descriptor: None)


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """Where runs are pushed to."""
    return tmp_path / "away"


@pytest.fixture
def other(tmp_path: Path) -> RunStore:
    """The runs directory of another machine."""
    return RunStore(tmp_path / "other")


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = ((path.relative_to(folder).as_posix(), path) for path in paths)
    found = {name: path.read_bytes() for name, path in names if not name.startswith(NOT_COPIED)}
    if pointers := found.get(POINTERS):
        found[POINTERS] = json.dumps(json.loads(pointers), sort_keys=True).encode()
    return found


def leftovers(store: RunStore) -> list[str]:
    names = os.listdir(store.runs_dir) if store.runs_dir.exists() else []
    return [name for name in names if name not in (".gitignore", "README.md")]


def listing(run: Run, away: Path) -> Any:
    return json.loads((away / run.name / LISTING_NAME).read_text())


def interrupt(stage: str, number: int) -> Callable[[Progress], None]:
    """A report that interrupts a stage, as Ctrl-C does, at its n-th call."""
    calls: list[Progress] = []

    def report(progress: Progress) -> None:
        calls.extend([progress] if progress.stage == stage else [])
        if len(calls) == number:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("scheme", ["", "file://", "memory:/"])
def test_a_run_arrives_byte_for_byte(store: RunStore, other: RunStore, away: Path, scheme: str) -> None:
    run, url = make(store), f"{scheme}{away}"
    first = push(run, url)
    assert (first.num_files, first.num_bytes) == (first.moved_files, first.moved_bytes)
    assert first.checkpoints == ("best", "latest", "previous", "step-00000000", "step-00000001")
    pulled = pull(other, url)
    assert contents(other.open(run.id).path) == contents(run.path)
    assert (pulled.num_files, pulled.moved_bytes) == (first.num_files, first.num_bytes)
    assert leftovers(other) == [run.name]
    # Everything is there already.
    assert push(run, url) == replace(first, moved_files=0, moved_bytes=0)
    assert pull(other, url).moved_files == 0


def test_what_was_pushed_to_a_folder_is_a_run_there(store: RunStore, away: Path) -> None:
    run = make(store)
    push(run, str(away))
    there = RunStore(away).open(run.id)
    for name in CheckpointManager().names(run):
        assert CheckpointManager().load(there, name).metadata == CheckpointManager().load(run, name).metadata


@pytest.mark.parametrize("name", ["run_v1", "run_v1_fsdp", "run_v2_fsdp", "run_v2_ema_muon"])
def test_runs_of_all_formats_travel(tmp_path: Path, other: RunStore, away: Path, name: str) -> None:
    run = copy_fixture(name, tmp_path / "runs")
    push(run, str(away))
    pull(other, str(away))
    assert contents(other.open(run.id).path) == contents(run.path)


def test_chosen_checkpoints(store: RunStore, other: RunStore, away: Path, tmp_path: Path) -> None:
    run, manager = make(store), CheckpointManager()
    assert push(run, str(away), ["best", "0"]).checkpoints == ("best", "step-00000000")
    assert pull(other, str(away)).checkpoints == ("best", "step-00000000")
    assert manager.names(other.open(run.id)) == ["best", "step-00000000"]
    # A second push adds; what is there stays.
    assert push(run, str(away), ["snapshots"]).moved_files == 4
    third = RunStore(tmp_path / "third")
    assert pull(third, str(away), checkpoints=["1", "best"]).checkpoints == ("best", "step-00000001")
    assert manager.names(third.open(run.id)) == ["best", "step-00000001"]
    # Two names of one folder.
    CheckpointManager().save(run, ["best", "latest"], checkpoint(9))
    for name in ("latest", "best"):
        push(run, str(away), [name])
    assert {"best", "latest", "step-00000001"} <= set(pull(RunStore(tmp_path / "fourth"), str(away)).checkpoints)
    for call in (lambda: push(run, str(away), ["bset"]), lambda: pull(third, str(away), checkpoints=["7"])):
        with pytest.raises(CheckpointError):
            call()


def test_a_later_push_replaces_what_changed(store: RunStore, other: RunStore, away: Path) -> None:
    run = make(store)
    push(run, str(away))
    CheckpointManager().save(run, ["best", "latest"], checkpoint(7))
    run.metrics_path.write_bytes(METRICS + b'{"step": 7, "loss": 5.0}\n')
    push(run, str(away))
    assert contents(away / run.name).keys() - {LISTING_NAME} == contents(run.path).keys()
    pull(other, str(away))
    assert contents(other.open(run.id).path) == contents(run.path)


# Runs that are being trained


def test_a_running_run_is_pushed_as_it_was_at_one_moment(store: RunStore, other: RunStore, away: Path) -> None:
    run = make(store, "running")
    run.metrics_path.write_bytes(METRICS + b'{"step": 3, "lo')
    saved: list[Progress] = []

    def train_on(progress: Progress) -> None:
        """Save twice while the push reads, which removes every folder that it found."""
        if not saved:
            saved.append(progress)
            for step in (8, 9):
                CheckpointManager().save(run, ["best", "latest"], checkpoint(step))

    with locked(run.path):
        before = contents(run.path)
        push(run, str(away), report=train_on)
    pull(other, str(away))
    found = contents(other.open(run.id).path)
    record = json.loads(found.pop("run.json"))
    expected = {name: data for name, data in before.items() if name not in ("run.json", "metrics.jsonl")}
    assert found == expected | {"metrics.jsonl": METRICS}
    assert record == json.loads(before["run.json"]) | {"status": "interrupted"}
    assert other.open(run.id).status == "interrupted"
    assert leftovers(store) == [run.name]


@pytest.mark.parametrize("stage", ["reading", "sending"])
def test_an_interrupted_push_of_a_running_run_leaves_nothing_here(store: RunStore, away: Path, stage: str) -> None:
    run = make(store, "running")
    with locked(run.path), pytest.raises(KeyboardInterrupt):
        push(run, str(away), report=interrupt(stage, 3))
    assert leftovers(store) == [run.name]


def test_two_pushes_of_a_running_run(store: RunStore, away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumiere.files.PATIENCE", 0.01)
    run = make(store, "running")

    tried: list[Progress] = []

    def push_again(progress: Progress) -> None:
        if not tried:
            tried.append(progress)
            with pytest.raises(RunBusyError, match="is being pushed"):
                push(run, str(away))

    with locked(run.path):
        push(run, str(away), report=push_again)
    assert tried


def test_a_file_that_changes_on_the_way_is_refused(store: RunStore, other: RunStore, away: Path) -> None:
    run = make(store)

    def change(progress: Progress) -> None:
        if progress.stage == "sending":
            run.tokenizer_path.write_bytes(b"another")

    with pytest.raises(LumiereError, match="changed while"):
        push(run, str(away), report=change)
    with pytest.raises(RunNotFoundError):
        pull(other, str(away), run.name)


# Interrupts


@pytest.mark.parametrize("number", [1, 4, 12, 22])
def test_an_interrupted_push_goes_on(store: RunStore, other: RunStore, away: Path, number: int) -> None:
    run = make(store)
    with pytest.raises(KeyboardInterrupt):
        push(run, str(away), report=interrupt("sending", number))
    with pytest.raises(RunNotFoundError):
        pull(other, str(away))
    again = push(run, str(away))
    assert again.moved_files == again.num_files - (number - 1)
    assert UNFINISHED_NAME not in contents(away / run.name)
    pull(other, str(away))
    assert contents(other.open(run.id).path) == contents(run.path)


def test_an_interrupted_push_of_more_leaves_the_old_one_valid(store: RunStore, other: RunStore, away: Path) -> None:
    run = make(store)
    push(run, str(away))
    before = contents(run.path)
    CheckpointManager().save(run, "latest", checkpoint(7))
    with pytest.raises(KeyboardInterrupt):
        push(run, str(away), report=interrupt("sending", 2))
    pull(other, str(away))
    assert contents(other.open(run.id).path) == before
    push(run, str(away))
    assert contents(away / run.name).keys() - {LISTING_NAME} == contents(run.path).keys()


def test_a_run_that_is_being_replaced_cannot_be_pulled(store: RunStore, other: RunStore, away: Path) -> None:
    run = make(store)
    push(run, str(away))
    run.metrics_path.write_bytes(METRICS * 2)
    with pytest.raises(KeyboardInterrupt):
        push(run, str(away), report=interrupt("sending", 1))
    with pytest.raises(RunNotFoundError):
        pull(other, str(away), run.id)
    assert push(run, str(away)).moved_files == 1
    pull(other, str(away))
    assert contents(other.open(run.id).path) == contents(run.path)


@pytest.mark.parametrize("number", [1, 4, 12, 22])
def test_an_interrupted_pull_shows_no_run_and_goes_on(
    store: RunStore, other: RunStore, away: Path, number: int
) -> None:
    run = make(store)
    push(run, str(away))
    with pytest.raises(KeyboardInterrupt):
        pull(other, str(away), report=interrupt("fetching", number))
    assert other.all() == []
    again = pull(other, str(away))
    assert again.moved_files == again.num_files - (number - 1)
    assert leftovers(other) == [run.name]
    assert contents(other.open(run.id).path) == contents(run.path)


def test_a_pull_that_goes_on_keeps_no_stranger(store: RunStore, other: RunStore, away: Path) -> None:
    run = make(store)
    push(run, str(away))
    with pytest.raises(KeyboardInterrupt):
        pull(other, str(away), report=interrupt("fetching", 9))
    (folder,) = other.runs_dir.glob(".pulling.*")
    (folder / "config.yaml").write_text("training: {seed: 2}\n")
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "stranger.json").write_text("{}")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(run.tokenizer_path)
    pull(other, str(away))
    assert contents(other.open(run.id).path) == contents(run.path)
    assert not any(path.is_symlink() for path in other.open(run.id).path.rglob("*"))


def test_everything_is_durable_before_the_run_appears(store: RunStore, tmp_path: Path, away: Path) -> None:
    run, disk = make(store), StrictDisk()
    push(run, str(away))
    pull(RunStore(tmp_path / "other", disk), str(away))
    assert disk.renamed[-1] == run.name


def test_two_pulls_of_one_run(store: RunStore, other: RunStore, away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumiere.files.PATIENCE", 0.01)
    push(make(store), str(away))
    tried: list[Progress] = []

    def pull_again(progress: Progress) -> None:
        if not tried:
            tried.append(progress)
            with pytest.raises(RunBusyError, match="is being pulled"):
                pull(other, str(away))

    pull(other, str(away), report=pull_again)
    assert tried
    assert len(other.all()) == 1


# Names of runs


def test_a_run_is_found_by_its_name_id_or_place(store: RunStore, away: Path, tmp_path: Path) -> None:
    first, second = make(store), store.create()
    for run in (first, second):
        push(run, str(away))
    (away / "another folder").mkdir()
    for number, (url, reference) in enumerate(
        [
            (str(away), first.id),
            (f"{away}/", first.id[:7]),
            (f"file://{away}", first.name),
            (f"{away}/{first.name}", None),
            (f"{away}/{first.name}/", None),
        ]
    ):
        assert pull(RunStore(tmp_path / str(number)), url, reference).run == first.name
    for reference in (None, "nothere1", "", "../away", "another folder"):
        with pytest.raises(RunNotFoundError):
            pull(RunStore(tmp_path / "none"), str(away), reference)
    assert not (tmp_path / "none").exists()


def test_another_run_of_that_id_is_refused(store: RunStore, other: RunStore, away: Path) -> None:
    run = make(store)
    push(run, str(away))
    pull(other, str(away))
    copied = other.open(run.id)
    for change in (
        lambda: copied.metrics_path.write_bytes(b""),
        lambda: (copied.checkpoints_dir / "pointers.json").write_text('{"best": "step-00000001"}'),
        lambda: shutil.rmtree(copied.checkpoints_dir / "snapshots"),
    ):
        shutil.rmtree(copied.path)
        pull(other, str(away))
        change()
        before = contents(copied.path)
        with pytest.raises(LumiereError, match=f"run {run.id} is in"):
            pull(other, str(away))
        assert contents(copied.path) == before


def test_a_run_is_not_pushed_onto_itself(store: RunStore) -> None:
    run = make(store)
    before = contents(run.path)
    with pytest.raises(LumiereError, match="is the folder that"):
        push(run, str(store.runs_dir))
    assert contents(run.path) == before


# Hostile places

HASH = "0" * 64
Change = Callable[[dict[str, Any]], Any]


def entry(name: str, num_bytes: Any = 1, sha256: Any = HASH) -> dict[str, Any]:
    return {"name": name, "bytes": num_bytes, "sha256": sha256}


LISTINGS: dict[str, Change] = {
    "a parent": lambda listing: listing["files"].append(entry("../../stolen")),
    "a parent in a folder": lambda listing: listing["files"].append(
        entry("checkpoints/step-00000001/../../x.safetensors")
    ),
    "an absolute path": lambda listing: listing["files"].append(entry("/etc/passwd")),
    "a file of no run": lambda listing: listing["files"].append(entry("train.py")),
    "a pickle": lambda listing: listing["files"].append(entry("checkpoints/step-00000001/model.pt")),
    "a hidden file": lambda listing: listing["files"].append(entry(".lock")),
    "a name with a line end": lambda listing: listing["files"].append(entry("run.json\n")),
    "backslashes": lambda listing: listing["files"].append(entry("eval\\..\\x.json")),
    "the same file twice": lambda listing: listing["files"].append(listing["files"][0]),
    "no name": lambda listing: listing["files"].append(entry(3)),  # type: ignore
    "a checkpoint without a name": lambda listing: listing["checkpoints"].pop("latest"),
    "a checkpoint without files": lambda listing: listing["checkpoints"].update(best="step-00000099"),
    "a checkpoint elsewhere": lambda listing: listing["checkpoints"].update(best="../step-00000001"),
    "a checkpoint of another name": lambda listing: listing["checkpoints"].update(worst="step-00000001"),
    "a huge file": lambda listing: listing["files"][0].update(bytes=2**62),
    "a file that is longer": lambda listing: listing["files"][0].update(bytes=3),
    "a file that is shorter": lambda listing: listing["files"][0].update(bytes=10**6),
    "a negative length": lambda listing: listing["files"][0].update(bytes=-1),
    "a length that is true": lambda listing: listing["files"][0].update(bytes=True),
    "a wrong hash": lambda listing: listing["files"][0].update(sha256=HASH),
    "no hash": lambda listing: listing["files"][0].update(sha256=None),
    "no files": lambda listing: listing.pop("files"),
    "files that are none": lambda listing: listing.update(files={"name": 1}),
    "checkpoints that are none": lambda listing: listing.update(checkpoints=[1]),
    "another run": lambda listing: listing.update(run="run_aaaaaaaa_20250101_000000"),
    "a newer format": lambda listing: listing.update(lumiere_transfer="2"),
    "no format": lambda listing: listing.pop("lumiere_transfer"),
}


def test_a_hostile_listing_brings_nothing(store: RunStore, other: RunStore, away: Path, tmp_path: Path) -> None:
    run = make(store)
    push(run, str(away))
    text = json.dumps(listing(run, away))
    before = set(tmp_path.rglob("*"))
    for what, change in LISTINGS.items():
        values = json.loads(text)
        change(values)
        (away / run.name / LISTING_NAME).write_text(json.dumps(values))
        with pytest.raises(LumiereError):
            pull(other, str(away))
        assert leftovers(other) == [], what
        assert {path for path in tmp_path.rglob("*") if other.runs_dir not in (path, path.parent)} == before, what
    # A push mends it.
    push(run, str(away))
    pull(other, str(away))
    assert contents(other.open(run.id).path) == contents(run.path)


FILES: dict[str, Callable[[Path], Any]] = {
    "a missing file": lambda path: path.unlink(),
    "a changed file": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "a shorter file": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a longer file": lambda path: path.write_bytes(path.read_bytes() + b"x"),
}


def linked(path: Path) -> None:
    """Replace a file by a link to its contents."""
    path.symlink_to(shutil.move(path, path.with_name("moved")))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "checkpoints/step-00000001/model.safetensors"])
def test_a_damaged_file_brings_nothing(store: RunStore, other: RunStore, away: Path, name: str) -> None:
    run = make(store)
    for damage in (*FILES.values(), linked, piped):
        push(run, str(away))
        damage(away / run.name / name)
        with pytest.raises(TransferError, match=name):
            pull(other, str(away))
        assert leftovers(other) == []
        shutil.rmtree(away)


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step-00000001"])
def test_links_are_followed_neither_in_a_push_nor_in_a_pull(
    store: RunStore, other: RunStore, away: Path, tmp_path: Path, part: str
) -> None:
    run, elsewhere = make(store), tmp_path / "elsewhere"
    push(run, str(away))
    shutil.move(away / run.name / part, elsewhere)
    (away / run.name / part).symlink_to(elsewhere)
    before = contents(elsewhere)
    with pytest.raises(LumiereError, match="is a link"):
        pull(other, str(away))
    shutil.rmtree(run.checkpoints_dir)
    CheckpointManager().save(run, "best", checkpoint(1, 5.0))
    with pytest.raises(LumiereError, match="is a link"):
        push(run, str(away))
    assert contents(elsewhere) == before


def test_a_damaged_listing(store: RunStore, other: RunStore, away: Path) -> None:
    run = make(store)
    push(run, str(away))
    for text in (b"", b"{", b"[]", b"null", b"\xff", b'{"lumiere_transfer": "1"', b"[" * 10**5):
        (away / run.name / LISTING_NAME).write_bytes(text)
        with pytest.raises(TransferError):
            pull(other, str(away))
        assert leftovers(other) == []


def test_a_listing_without_an_end(
    store: RunStore, other: RunStore, away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(store)
    push(run, str(away))
    monkeypatch.setattr(transfer, "MAX_LISTING_BYTES", 1000)
    with pytest.raises(TransferError, match="longer than"):
        pull(other, str(away))


def test_a_link_in_a_run_is_not_pushed(store: RunStore, away: Path, tmp_path: Path) -> None:
    run = make(store)
    (tmp_path / "secret").write_text("secret")
    run.tokenizer_path.unlink()
    run.tokenizer_path.symlink_to(tmp_path / "secret")
    with pytest.raises(LumiereError, match="is a link"):
        push(run, str(away))
    assert not away.exists()
