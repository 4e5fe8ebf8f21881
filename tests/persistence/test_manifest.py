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


Change = Callable[[Path], object]
JSON = "checkpoint.json"


def put(value: Any, *place: str | int) -> Change:
    """Set one value of the manifest as somebody does who makes its hash right again."""

    def change(folder: Path) -> None:
        manifest = read(folder)
        container: Any = manifest
        for key in place[:-1]:
            container = container[key]
        container[place[-1]] = value
        seal(folder, manifest)

    return change


def write(text: str, name: str = JSON) -> Change:
    return lambda folder: (folder / name).write_text(text)


def cut(length: int, name: str = JSON) -> Change:
    return lambda folder: os.truncate(folder / name, length)


def link(name: str) -> Change:
    def change(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "elsewhere")
        os.symlink(folder.parent / "elsewhere", folder / name)

    return change


def replace(name: str, make: Change) -> Change:
    """Remove a file and make something else in its place."""
    return lambda folder: ((folder / name).unlink(), make(folder / name))


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
    put(length, "files", 0, "bytes")(folder)


def exchange(folder: Path) -> None:
    """Two files, each in the place of the other; the rows are as many, and those of other places."""
    first, second, *rest = read(folder)["files"]
    put([second, first, *rest], "files")(folder)


WEIGHT = ("tensors", "model.weight")
HOSTILE: dict[str, tuple[Change, str]] = {
    "no manifest": (lambda folder: (folder / JSON).unlink(), "it has no checkpoint.json"),
    "a manifest that is a link": (link(JSON), "checkpoint.json is a link"),
    "a manifest that is a folder": (replace(JSON, Path.mkdir), "cannot be read"),
    "a manifest cut short": (cut(300), "checkpoint.json"),
    "an empty manifest": (cut(0), "not a JSON object"),
    "a manifest with a hole": (cut(2**40), "More than 10,000,000"),
    "a list": (write("[1]"), "not a JSON object"),
    "nested": (write("[" * 10**6), "not a JSON object"),
    "nested objects": (write('{"a":' * 50 + "1" + "}" * 50), "not a JSON object"),
    "somebody else's": (write("{}"), "not a Lumiere checkpoint"),
    "a newer format": (put("3", "lumiere_format"), "'3'"),
    "a format that is no text": (put([1], "lumiere_format"), "not a Lumiere checkpoint"),
    "a changed manifest": (
        lambda folder: write((folder / JSON).read_text().replace("4.418", "4.419"))(folder),
        "checkpoint.json does not match its hash",
    ),
    "a file missing": (lambda folder: (folder / "shard-2.safetensors").unlink(), "shard-2.safetensors is missing"),
    "a file left over": (write("", "shard-9.safetensors"), "shard-9.safetensors does not belong there"),
    "a file that is a link": (link("shard-1.safetensors"), "shard-1.safetensors"),
    "a file that is a pipe": (replace("rng.safetensors", os.mkfifo), "rng.safetensors"),
    "a file cut short": (cut(100, "shard-1.safetensors"), "shard-1.safetensors has 100 bytes instead of"),
    "a bit of a tensor": (flip("shard-3.safetensors"), "it does not match its hash"),
    "a bit of the random numbers": (flip("rng.safetensors"), "it does not match its hash"),
    "terabytes": (announce_terabytes, "holds 2,199.0 GB of tensors"),
    "a hole behind the tensors": (lengthen, "out of range"),
    "files exchanged": (exchange, "it does not hold the rows of model"),
    "a gap between shards": (put([[0, 0, 2], [2, 4, 5]], *WEIGHT, "shards"), "overlap or leave gaps"),
    "a gap at the end": (put([[0, 0, 2], [1, 2, 4]], *WEIGHT, "shards"), "overlap or leave gaps"),
    "a gap at the start": (put([[1, 2, 4], [2, 4, 5]], *WEIGHT, "shards"), "overlap or leave gaps"),
    "rows twice": (put([[0, 0, 2], [1, 0, 2], [1, 2, 4], [2, 4, 5]], *WEIGHT, "shards"), "overlap or leave gaps"),
    "rows backwards": (put([[0, 0, 9], [1, 9, 5]], *WEIGHT, "shards"), "leave gaps"),
    "more rows than the file has": (put([0, 0, 1], *WEIGHT, "shards", 0), "gaps"),
    "more rows than there are": (
        put({"dtype": "F32", "shape": [6, 2], "shards": [[0, 0, 2], [1, 2, 4], [2, 4, 6]]}, *WEIGHT),
        "it does not hold the rows of model.weight",
    ),
    "a type that is none": (put("F33", *WEIGHT, "dtype"), "out of range"),
    "another type": (put("I32", *WEIGHT, "dtype"), "it does not hold the rows"),
    "another shape": (put([5, 1], *WEIGHT, "shape"), "it does not hold the rows"),
    "a long shape": (put([5, 2**62], *WEIGHT, "shape"), "out of range"),
    "a long shape of nothing": (put([0, 2**62, 2**62], "tensors", "model.none", "shape"), "out of range"),
    "many dimensions": (put([5, 2, *[1] * 100], *WEIGHT, "shape"), "out of range"),
    "a length below nothing": (put([5, -2], *WEIGHT, "shape"), "out of range"),
    "a length that is a truth": (put([5, True], *WEIGHT, "shape"), "out of range"),
    "a shard of no file": (put([99, 0, 2], *WEIGHT, "shards", 0), "does not list"),
    "a shard of four": (put([0, 0, 2, 1], *WEIGHT, "shards", 0), "does not list"),
    "a path": (put("../a/shard-1.safetensors", "files", 0, "name"), "out of range"),
    "an absolute path": (put("/etc/passwd", "files", 0, "name"), "out of range"),
    "a hidden file": (put(".a.safetensors", "files", 0, "name"), "out of range"),
    "a name that is none": (put(7, "files", 0, "name"), "out of range"),
    "a file twice": (put("shard-2.safetensors", "files", 0, "name"), "out of range"),
    "a length in words": (put("some", "files", 0, "bytes"), "out of range"),
    "no files": (put(None, "files"), "does not list"),
    "files by name": (put({"a": 1}, "files"), "does not list"),
    "tensors in a list": (put([], "tensors"), "does not list"),
    "metadata in a list": (put([], "metadata"), "out of range"),
    "a group that is none": (
        put({"dtype": "F32", "shape": [0], "shards": []}, "tensors", "a.b"),
        "out of range",
    ),
    "a prefix of another group": (put("optimizer.", "files", 0, "prefix"), "out of range"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_that_is_not_as_it_was_written_is_refused(folder: Path, name: str) -> None:
    change, message = HOSTILE[name]
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert message in caught.value.message
    assert caught.value.hint


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
