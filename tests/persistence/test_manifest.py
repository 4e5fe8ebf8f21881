"""The folder of a checkpoint is never trusted: it is as it was written, or refused with a reason."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lumiere.errors import CheckpointError
from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint
from lumiere.persistence.checkpoint_writer import write_checkpoint
from lumiere.persistence.manifest import MANIFEST_NAME, read_manifest
from tests.checkpoints import seal
from tests.persistence.shards import flip, make_folder, read, shared_out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Made by hand, as three processes would have written it."""
    return make_folder(tmp_path / "latest")


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A change of the manifest by somebody who makes its hash right again."""

    def changed(folder: Path) -> None:
        manifest = read(folder)
        change(manifest)
        seal(folder, manifest)

    return changed


def entry(manifest: dict[str, Any], name: str = "model.weight") -> dict[str, Any]:
    return manifest["tensors"][name]


def replace_by_link(folder: Path) -> None:
    shutil.move(folder / "shard-1.safetensors", folder.parent / "elsewhere")
    os.symlink(folder.parent / "elsewhere", folder / "shard-1.safetensors")


def link_manifest(folder: Path) -> None:
    shutil.move(folder / "checkpoint.json", folder.parent / "elsewhere")
    os.symlink(folder.parent / "elsewhere", folder / "checkpoint.json")


def announce_terabytes(folder: Path) -> None:
    """Files with holes, which take no room, as long as the tensor that they announce."""
    rows = 2**38
    header = json.dumps({"model.weight": {"dtype": "F32", "shape": [rows, 2], "data_offsets": [0, rows * 8]}}).encode()
    with open(folder / "shard-1.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 8)
    manifest = read(folder)
    manifest["tensors"] = {"model.weight": {"dtype": "F32", "shape": [rows, 2], "shards": [[0, 0, rows]]}}
    manifest["files"][0]["bytes"] = 8 + len(header) + rows * 8
    seal(folder, manifest)


def lengthen(folder: Path) -> None:
    """One more tensor, a hole of a terabyte that nobody asks for, and yet would have to be read for the hash."""
    path = folder / "shard-1.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8:start]), data[start:]
    header["model.more"] = {"dtype": "U8", "shape": [2**40], "data_offsets": [len(tensors), len(tensors) + 2**40]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
    length = 8 + len(text) + len(tensors) + 2**40
    os.truncate(path, length)
    edit(lambda manifest: manifest["files"][0].update(bytes=length))(folder)


def exchange(folder: Path) -> None:
    """Two files, each in the place of the other; the rows are as many, and those of other places."""
    manifest = read(folder)
    manifest["files"][0], manifest["files"][1] = manifest["files"][1], manifest["files"][0]
    seal(folder, manifest)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / "checkpoint.json").unlink(), "it has no checkpoint.json"),
    "a manifest that is a link": (link_manifest, "checkpoint.json is a link"),
    "a manifest that is a folder": (
        lambda folder: ((folder / "checkpoint.json").unlink(), (folder / "checkpoint.json").mkdir()),
        "cannot be read",
    ),
    "a manifest cut short": (
        lambda folder: os.truncate(folder / "checkpoint.json", 300),
        "checkpoint.json",
    ),
    "an empty manifest": (lambda folder: os.truncate(folder / "checkpoint.json", 0), "not a JSON object"),
    "a manifest with a hole": (lambda folder: os.truncate(folder / "checkpoint.json", 2**40), "More than 10,000,000"),
    "a list": (lambda folder: (folder / "checkpoint.json").write_text("[1]"), "not a JSON object"),
    "nested": (lambda folder: (folder / "checkpoint.json").write_text("[" * 10**6), "not a JSON object"),
    "nested objects": (
        lambda folder: (folder / "checkpoint.json").write_text('{"a":' * 50 + "1" + "}" * 50),
        "not a JSON object",
    ),
    "somebody else's": (lambda folder: (folder / "checkpoint.json").write_text("{}"), "not a Lumiere checkpoint"),
    "a newer format": (
        edit(lambda manifest: manifest.update(lumiere_format="3")),
        "'3'",
    ),
    "a format that is no text": (
        edit(lambda manifest: manifest.update(lumiere_format=[1])),
        "not a Lumiere checkpoint",
    ),
    "a changed manifest": (
        lambda folder: (folder / "checkpoint.json").write_text(
            (folder / "checkpoint.json").read_text().replace("4.418", "4.419")
        ),
        "checkpoint.json does not match its hash",
    ),
    "a file missing": (lambda folder: (folder / "shard-2.safetensors").unlink(), "shard-2.safetensors is missing"),
    "a file left over": (
        lambda folder: shutil.copyfile(folder / "shard-2.safetensors", folder / "shard-9.safetensors"),
        "shard-9.safetensors does not belong there",
    ),
    "a file that is a link": (replace_by_link, "shard-1.safetensors"),
    "a file that is a pipe": (
        lambda folder: ((folder / "rng.safetensors").unlink(), os.mkfifo(folder / "rng.safetensors")),
        "rng.safetensors",
    ),
    "a file cut short": (
        lambda folder: os.truncate(folder / "shard-1.safetensors", 100),
        "shard-1.safetensors has 100 bytes instead of",
    ),
    "a bit of a tensor": (flip("shard-3.safetensors"), "it does not match its hash"),
    "a bit of the random numbers": (flip("rng.safetensors"), "it does not match its hash"),
    "terabytes": (announce_terabytes, "holds 2,199.0 GB of tensors"),
    "a hole behind the tensors": (lengthen, "out of range"),
    "files exchanged": (exchange, "it does not hold the rows of model"),
    "a gap between shards": (edit(lambda manifest: entry(manifest)["shards"].pop(1)), "overlap or leave gaps"),
    "a gap at the end": (edit(lambda manifest: entry(manifest)["shards"].pop()), "overlap or leave gaps"),
    "a gap at the start": (edit(lambda manifest: entry(manifest)["shards"].pop(0)), "overlap or leave gaps"),
    "rows twice": (edit(lambda manifest: entry(manifest)["shards"].insert(1, [1, 0, 2])), "overlap or leave gaps"),
    "rows backwards": (edit(lambda manifest: entry(manifest).update(shards=[[0, 0, 9], [1, 9, 5]])), "leave gaps"),
    "more rows than the file has": (edit(lambda manifest: entry(manifest)["shards"].__setitem__(0, [0, 0, 1])), "gaps"),
    "more rows than there are": (
        edit(lambda manifest: entry(manifest).update(shape=[6, 2], shards=[[0, 0, 2], [1, 2, 4], [2, 4, 6]])),
        "it does not hold the rows of model.weight",
    ),
    "a type that is none": (edit(lambda manifest: entry(manifest).update(dtype="F33")), "out of range"),
    "another type": (edit(lambda manifest: entry(manifest).update(dtype="I32")), "it does not hold the rows"),
    "another shape": (edit(lambda manifest: entry(manifest).update(shape=[5, 1])), "it does not hold the rows"),
    "a long shape": (edit(lambda manifest: entry(manifest).update(shape=[5, 2**62])), "out of range"),
    "a long shape of nothing": (
        edit(lambda manifest: entry(manifest, "model.none").update(shape=[0, 2**62, 2**62])),
        "out of range",
    ),
    "many dimensions": (edit(lambda manifest: entry(manifest).update(shape=[5, 2, *[1] * 100])), "out of range"),
    "a length below nothing": (edit(lambda manifest: entry(manifest).update(shape=[5, -2])), "out of range"),
    "a length that is a truth": (edit(lambda manifest: entry(manifest).update(shape=[5, True])), "out of range"),
    "a shard of no file": (edit(lambda manifest: entry(manifest)["shards"][0].__setitem__(0, 99)), "does not list"),
    "a shard of four": (edit(lambda manifest: entry(manifest)["shards"][0].append(1)), "does not list"),
    "a path": (
        edit(lambda manifest: manifest["files"][0].update(name="../a/shard-1.safetensors")),
        "out of range",
    ),
    "an absolute path": (edit(lambda manifest: manifest["files"][0].update(name="/etc/passwd")), "out of range"),
    "a hidden file": (edit(lambda manifest: manifest["files"][0].update(name=".a.safetensors")), "out of range"),
    "a name that is none": (edit(lambda manifest: manifest["files"][0].update(name=7)), "out of range"),
    "a file twice": (edit(lambda manifest: manifest["files"].append(manifest["files"][0])), "out of range"),
    "a length in words": (edit(lambda manifest: manifest["files"][0].update(bytes="some")), "out of range"),
    "no files": (edit(lambda manifest: manifest.pop("files")), "does not list"),
    "files by name": (edit(lambda manifest: manifest.update(files={"a": 1})), "does not list"),
    "tensors in a list": (edit(lambda manifest: manifest.update(tensors=[])), "does not list"),
    "metadata in a list": (edit(lambda manifest: manifest.update(metadata=[])), "out of range"),
    "a group that is none": (
        edit(lambda manifest: manifest["tensors"].update({"weights.a": entry(manifest)})),
        "out of range",
    ),
    "a prefix of another group": (
        edit(lambda manifest: manifest["files"][0].update(prefix="optimizer.")),
        "out of range",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_that_is_not_as_it_was_written_is_refused(folder: Path, name: str) -> None:
    change, message = HOSTILE[name]
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert message in caught.value.message
    assert caught.value.hint


def test_an_error_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone"):
        read_manifest(tmp_path / "gone")


def test_a_manifest_of_90_megabytes_is_not_parsed(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_bytes(path.read_bytes().ljust(90_000_000))  # whole but for its length: JSON with white space
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="cannot be read: More than"):
            read_manifest(folder)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


def test_a_manifest_that_is_too_long_to_be_read_is_not_written(tmp_path: Path) -> None:
    notes = "x" * 10_000_000
    with pytest.raises(OSError, match=r"checkpoint\.json"):
        write_checkpoint(tmp_path / "step-00000001", Checkpoint({}, metadata={"step": 1, "notes": notes}))
    assert not (tmp_path / "step-00000001" / MANIFEST_NAME).exists()


def test_a_header_that_lies_is_refused_though_its_hash_is_right(tmp_path: Path) -> None:
    files = shared_out()
    start, rows = files["shard-2.safetensors"]["model.weight"]
    for wrong in (rows[:, :1], rows[:1], rows.double(), rows.reshape(4)):
        folder = make_folder(tmp_path / str(list(wrong.shape)) / str(wrong.dtype), files)
        right = read(folder)
        files["shard-2.safetensors"]["model.weight"] = (start, wrong)
        lying = read(make_folder(folder.with_name("lying"), files))
        shutil.copy(folder.with_name("lying") / "shard-2.safetensors", folder / "shard-2.safetensors")
        right["files"][1] = lying["files"][1]
        seal(folder, right)
        files["shard-2.safetensors"]["model.weight"] = (start, rows)
        with pytest.raises(CheckpointError, match=r"it does not hold the rows|out of range"):
            load_checkpoint(folder)
