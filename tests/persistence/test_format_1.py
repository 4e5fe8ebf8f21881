"""A checkpoint file of format 1 comes back bit for bit, or not at all. Files are written here by its documentation."""

import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lumiere.errors import CheckpointError
from lumiere.persistence.checkpoint import load_checkpoint, read_metadata
from tests.persistence.shards import old_texts as ours


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "best.safetensors"


def write_file(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b'"text"',
        b"7",
        b"null",
        b"[" * 100_000,
        b"9" * 10_000,
        b"\xff\xfe{}",
        {"model.a": TENSOR | {"shape": [1]}},
        {"model.a": TENSOR, "__metadata__": []},
        {"__metadata__": "text"},
        {"__metadata__": ours(metadata=5)},
        {"__metadata__": ours() | {"metadata": '{"step": 1}'}},
        {"__metadata__": ours(lumiere_format=1)},
        {"__metadata__": ours(format="np")},
        {"__metadata__": ours(), "model.a": TENSOR},
        {"__metadata__": ours(), "model.a": 5},
        {"__metadata__": ours(), "model.a": {}},
        {"__metadata__": ours(), "model.a": TENSOR | {"shape": [2]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"shape": [-1]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"shape": "wide"}},
        {"__metadata__": ours(), "model.a": TENSOR | {"dtype": "F31"}},
        {"__metadata__": ours(), "model.a": TENSOR | {"dtype": None}},
        {"__metadata__": ours(), "model.a": TENSOR | {"data_offsets": [0]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"data_offsets": [0.0, 4.0]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"data_offsets": [-4, 4]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"data_offsets": [0, 10**18]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"data_offsets": [4, 0]}, "model.b": TENSOR},
        {"__metadata__": ours(), "model.a": TENSOR, "model.b": TENSOR},  # both of the same bytes
        {"__metadata__": ours(), "model.a": TENSOR | {"data_offsets": [2, 4], "dtype": "F16"}},  # a gap before it
        {"__metadata__": ours(), "model.a": TENSOR | {"dtype": [[[[[["F32"]]]]]]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"shape": [10**30]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"shape": [1] * 100_000}},
        {"__metadata__": ours(), "model.a": TENSOR | {"dtype": "F4", "shape": [8]}},
        {"__metadata__": ours(), "model.\ud800": TENSOR},
        b'{"__metadata__": {}, "model.a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "model.a": {}}',
        b'{"model.a": ' + b'{"a": ' * 50_000,
        {"__metadata__": ours(), "model.a": TENSOR | {"shape": [2**40, 2**40, 0], "data_offsets": [4, 4]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"shape": [2**63, 0], "data_offsets": [4, 4]}},
        {"__metadata__": ours(), "model.a": TENSOR | {"shape": [2**64, 0], "data_offsets": [4, 4]}},
    ],
)
def test_a_header_that_lies_is_a_clear_error(path: Path, header: Any) -> None:
    write_file(path, {"__metadata__": ours()})
    assert load_checkpoint(path).metadata == {}, "the headers are sound but for their change"
    write_file(path, header, bytes(4) if "model.a" in str(header) else b"")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("spans", "size"),
    [
        ([(0, 8), (0, 8)], 8),
        ([(0, 8), (4, 12)], 12),
        ([(4, 8)], 8),
        ([(0, 4), (8, 12)], 12),
        ([(0, 8), (8, 8), (4, 12)], 12),
    ],
)
def test_tensors_that_share_bytes_or_leave_some_are_damage_even_with_their_hashes(
    path: Path, spans: list[tuple[int, int]], size: int
) -> None:
    """A kilobyte of header could otherwise make of one gigabyte of data as many as it likes."""
    data = bytes(range(size))
    names = [f"a{i}" for i in range(len(spans))]
    described = b"".join(
        json.dumps([name, "torch.float32", [(end - begin) // 4]]).encode() + data[begin:end]
        for name, (begin, end) in zip(names, spans, strict=True)
    )
    header = {
        f"model.{name}": {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in zip(names, spans, strict=True)
    }
    texts = ours(**{"sha256.model": hashlib.sha256(described).hexdigest()})
    write_file(path, {"__metadata__": texts} | header, data)
    for read in (load_checkpoint, read_metadata):
        with pytest.raises(CheckpointError, match="is damaged"):
            read(path)


@pytest.mark.parametrize(
    "metadata",
    ["", "[]", "7", "null", '"text"', "{", '{"step": NaN}', '{"step": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}'],
)
def test_metadata_that_is_no_object_is_damage_even_with_its_hash(path: Path, metadata: str) -> None:
    write_file(path, {"__metadata__": ours(metadata=metadata)})
    for read in (load_checkpoint, read_metadata):
        with pytest.raises(CheckpointError, match="metadata"):
            read(path)


@pytest.mark.parametrize("metadata", ["{}", '{"step": -1}', '{"step": "9"}', '{"step": true}', '{"step": 1.5}'])
def test_a_step_that_is_none_is_a_clear_error(path: Path, metadata: str) -> None:
    write_file(path, {"__metadata__": ours(metadata=metadata)})
    with pytest.raises(CheckpointError, match="step"):
        load_checkpoint(path).step  # noqa: B018 (it raises)
    write_file(path, {"__metadata__": ours(metadata='{"step": 3}')})
    assert load_checkpoint(path).step == 3


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="this system does not say how much memory it has")
def test_a_file_of_holes_is_refused_before_its_tensors_are_read(path: Path) -> None:
    size = 2**46  # 70 TB, of which the file system keeps some kB
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    write_file(path, {"__metadata__": ours(), "model.a": tensor})
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        size = 2**43  # of ext4
        write_file(path, {"__metadata__": ours(), "model.a": tensor | {"shape": [size], "data_offsets": [0, size]}})
        os.truncate(path, path.stat().st_size + size)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_a_pipe_is_never_waited_for(path: Path) -> None:
    os.mkfifo(path)
    for read in (load_checkpoint, read_metadata):
        with pytest.raises(CheckpointError, match="best"):
            read(path)


@pytest.mark.parametrize("length", [99_999_999, 100_000_001, 2**40, 2**63, 2**64 - 1])
def test_an_enormous_header_is_refused_before_it_is_read(path: Path, length: int) -> None:
    with open(path, "wb") as file:
        file.write(length.to_bytes(8, "little"))
        if length > 100_000_000:
            file.truncate(200_000_000)  # sparse, and long enough for a header just over the limit
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"is damaged: it announces a header of [0-9,]+ bytes"):
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_what_is_no_checkpoint_at_all_is_named(tmp_path: Path, path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint '.*best\.safetensors'"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        load_checkpoint(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)
    torch.save({"model": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="is damaged"):  # a pickle
        load_checkpoint(path)
    safetensors.torch.save_file({"model.weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="Lumiere"):
        load_checkpoint(path)
    write_file(path, {"__metadata__": ours(lumiere_format="3")})
    with pytest.raises(CheckpointError, match="'3'") as caught:
        read_metadata(path)
    assert "newer Lumiere" in (caught.value.hint or "")
    for number in ("0", "-1", "1.5", "two", "\x1b[31m", "3\n", "9" * 10_000 + "x", "²"):
        write_file(path, {"__metadata__": ours(lumiere_format=number)})
        with pytest.raises(CheckpointError, match="has format") as caught:
            read_metadata(path)
        assert "newer Lumiere" not in (caught.value.hint or "")
        assert len(caught.value.message) < 500
