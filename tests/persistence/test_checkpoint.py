"""A checkpoint comes back bit for bit, or not at all."""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumiere.errors import CheckpointError
from lumiere.persistence import checkpoint as checkpoint_format
from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint, read_metadata, save_checkpoint
from tests.persistence.shards import assert_same

GROUPS = ("model", "optimizer", "rng")


def tiny_checkpoint() -> Checkpoint:
    return Checkpoint(
        model={"weight": torch.tensor([[1.5, -2.25], [float("nan"), 0.0]]), "scale": torch.tensor(3.0)},
        optimizer={"weight.exp_avg": torch.tensor([0.5, 0.25], dtype=torch.bfloat16)},
        rng={"cpu": torch.tensor([0, 7, 255], dtype=torch.uint8)},
        metadata={"step": 512, "best_loss": 4.418, "note": "é \ud800 \x1f", "config": {"model": {"d_key": 32}}},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "best.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    save_checkpoint(path, tiny_checkpoint())
    return path


def test_every_group_and_the_metadata_come_back_unchanged(saved: Path) -> None:
    loaded, expected = load_checkpoint(saved), tiny_checkpoint()
    for group in GROUPS:
        assert_same(getattr(loaded, group), getattr(expected, group))
    assert loaded.metadata == expected.metadata == read_metadata(saved)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3), (5, 1, 3)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(1)
    # Random bits: for floats that includes NaNs with a payload, which must survive too.
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    tensor = bits.view(dtype).reshape(shape)
    save_checkpoint(path, Checkpoint(model={"tensor": tensor}))
    assert_same(load_checkpoint(path).model, {"tensor": tensor})


def test_strided_and_shared_tensors_are_saved_by_value(path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    state = {"all": base, "transposed": base.T, "column": base[:, 1], "again": base, "wide": base[:1].expand(5, 4)}
    save_checkpoint(path, Checkpoint(model=state))
    loaded = load_checkpoint(path).model
    assert_same(loaded, {name: tensor.detach() for name, tensor in state.items()})
    loaded["all"].zero_()
    assert loaded["again"].sum() == 66
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_a_generator_goes_on_where_its_saved_state_was(path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    save_checkpoint(path, Checkpoint(model={}, rng={"cpu": generator.get_state()}))
    expected = torch.rand(5, generator=generator)
    restored = torch.Generator()
    restored.set_state(load_checkpoint(path).rng["cpu"])
    assert torch.equal(torch.rand(5, generator=restored), expected)


def test_only_the_named_groups_are_read(saved: Path) -> None:
    loaded = load_checkpoint(saved, groups=("model",))
    assert_same(loaded.model, tiny_checkpoint().model)
    assert loaded.optimizer == loaded.rng == {}
    assert loaded.metadata == tiny_checkpoint().metadata


def test_damage_in_a_group_that_is_not_read_does_no_harm(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[data.index(bytes([0, 7, 255]))] ^= 1  # the state of the generator
    saved.write_bytes(data)
    assert_same(load_checkpoint(saved, groups=("model", "optimizer")).model, tiny_checkpoint().model)
    with pytest.raises(CheckpointError, match="is damaged: the rng's tensors do not match their hash"):
        load_checkpoint(saved)


def test_any_safetensors_reader_can_read_the_file(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    assert_same({"scale": tensors["model.scale"]}, {"scale": torch.tensor(3.0)})
    with safetensors.safe_open(saved, framework="pt") as file:
        texts = file.metadata()
    assert texts["format"] == "pt"
    assert texts["lumiere_format"] == "1"
    assert json.loads(texts["metadata"]) == tiny_checkpoint().metadata
    # The documented hash, computed here by hand for the one-tensor group.
    described = json.dumps(["cpu", "torch.uint8", [3]]).encode() + bytes([0, 7, 255])
    assert texts["sha256.rng"] == hashlib.sha256(described).hexdigest()


def test_loaded_tensors_do_not_change_with_the_file(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    with open(saved, "r+b") as file:
        file.write(bytes(saved.stat().st_size))
    assert_same(loaded.model, tiny_checkpoint().model)


def test_a_file_cut_short_at_any_length_is_damaged(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged: "):
            load_checkpoint(saved)
        with pytest.raises(CheckpointError, match="is damaged: "):
            read_metadata(saved)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(saved)


def is_refused(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except CheckpointError:
        return True
    return False


def test_any_flipped_bit_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    assert not is_refused(saved)
    unnoticed = []
    for index in range(len(whole)):
        for bit in {0, 5, index % 8}:  # 5 turns a small letter into a capital one
            data = bytearray(whole)
            data[index] ^= 1 << bit
            saved.write_bytes(data)
            if not is_refused(saved):
                unnoticed.append((index, bit))
    assert unnoticed == []


@given(data=st.binary(max_size=300))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_garbage_is_never_a_checkpoint(path: Path, data: bytes) -> None:
    for content in (data, len(data).to_bytes(8, "little") + data):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        with pytest.raises(CheckpointError):
            read_metadata(path)


def write_file(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def ours(**changes: Any) -> dict[str, Any]:
    empty = hashlib.sha256(b"").hexdigest()
    hashes = {f"sha256.{group}": empty for group in GROUPS}
    text = {"metadata": "{}", "sha256.metadata": hashlib.sha256(b"{}").hexdigest()}
    return {"format": "pt", "lumiere_format": "1", **text, **hashes, **changes}


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def test_the_headers_of_the_next_test_are_sound_but_for_their_change(path: Path) -> None:
    write_file(path, {"__metadata__": ours()})
    assert load_checkpoint(path).metadata == {}


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
        {"__metadata__": ours(metadata='{"step": 1}')},
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


def resealed(metadata: str) -> dict[str, str]:
    return ours(**{"metadata": metadata, "sha256.metadata": hashlib.sha256(metadata.encode()).hexdigest()})


@pytest.mark.parametrize(
    "metadata",
    ["", "[]", "7", "null", '"text"', "{", '{"step": NaN}', '{"step": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}'],
)
def test_metadata_that_is_no_object_is_damage_even_with_its_hash(path: Path, metadata: str) -> None:
    write_file(path, {"__metadata__": resealed(metadata)})
    for read in (load_checkpoint, read_metadata):
        with pytest.raises(CheckpointError, match="is damaged: its metadata is no JSON object"):
            read(path)


@pytest.mark.parametrize("metadata", ["{}", '{"step": -1}', '{"step": "9"}', '{"step": true}', '{"step": 1.5}'])
def test_a_step_that_is_none_is_a_clear_error(path: Path, metadata: str) -> None:
    write_file(path, {"__metadata__": resealed(metadata)})
    with pytest.raises(CheckpointError, match="does not say of which step it is"):
        load_checkpoint(path).step  # noqa: B018 (it raises)
    write_file(path, {"__metadata__": resealed('{"step": 3}')})
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


@pytest.mark.parametrize(
    ("size", "count", "fits"), [(1000, 1, True), (1001, 1, False), (600, 3, True), (601, 3, False)]
)
def test_tensors_must_fit_into_the_free_memory_while_they_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, size: int, count: int, fits: bool
) -> None:
    monkeypatch.setattr(checkpoint_format, "available_memory", lambda: 3000)  # three times the largest, and the others
    save_checkpoint(path, Checkpoint({str(i): torch.zeros(size, dtype=torch.uint8) for i in range(count)}))
    if fits:
        assert len(load_checkpoint(path).model) == count
    else:
        with pytest.raises(CheckpointError, match="GB are free"):
            load_checkpoint(path)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this system does not say how much memory is free")
def test_the_free_memory_is_less_than_all(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = checkpoint_format.available_memory()
    assert available is not None
    assert 0 < available < total
    real = Path.read_text
    limited = {"/sys/fs/cgroup/memory.max": "4096\n"}  # as in a container
    monkeypatch.setattr(Path, "read_text", lambda path: limited.get(str(path)) or real(path))
    assert checkpoint_format.available_memory() == 4096


def test_a_pipe_is_never_waited_for(path: Path) -> None:
    os.mkfifo(path)
    for read in (load_checkpoint, read_metadata):
        with pytest.raises(CheckpointError, match="cannot be read: Not a regular file"):
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
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no checkpoint\.json"):
        load_checkpoint(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)
    safetensors.torch.save_file({"model.weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="but no checkpoint of Lumiere"):
        load_checkpoint(path)
    write_file(path, {"__metadata__": ours(lumiere_format="2")})
    with pytest.raises(CheckpointError, match="has format '2', this Lumiere reads format 1") as caught:
        read_metadata(path)
    assert "newer Lumiere" in (caught.value.hint or "")
    for number in ("0", "-1", "1.5", "two", "\x1b[31m", "2\n", "9" * 10_000 + "x", "²"):
        write_file(path, {"__metadata__": ours(lumiere_format=number)})
        with pytest.raises(CheckpointError, match="has format") as caught:
            read_metadata(path)
        assert "newer Lumiere" not in (caught.value.hint or "")
        assert len(caught.value.message) < 500


def test_no_pickle_is_read(path: Path) -> None:
    torch.save({"model": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_a_full_disk_is_said_and_the_old_checkpoint_stays(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        save_checkpoint(saved, Checkpoint(model={"weight": torch.zeros(9)}))
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_wrong_calls_are_value_errors(saved: Path) -> None:
    with pytest.raises(ValueError, match="no group optimiser in a checkpoint, it has model, optimizer, rng"):
        load_checkpoint(saved, groups=("optimiser",))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            save_checkpoint(saved, Checkpoint(model={}, metadata={"best_loss": value}))


def test_metadata_is_read_without_torch(saved: Path) -> None:
    code = (
        "import sys; from lumiere.persistence.checkpoint import read_metadata\n"
        "print(read_metadata(sys.argv[1])['step'], {'torch'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert result.stdout == "512 set()\n"
