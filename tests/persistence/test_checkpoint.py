"""The folder of a checkpoint comes back bit for bit, or not at all."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lumiere.errors import CheckpointError
from lumiere.files import Disk
from lumiere.persistence import checkpoint as checkpoint_module
from lumiere.persistence import tensor_files
from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint, load_outline, read_metadata
from lumiere.persistence.checkpoint_writer import write_checkpoint
from lumiere.persistence.manifest import DTYPES
from tests.persistence.shards import METADATA, assert_same, flip, raw_bytes, whole_tensors, write_old


def save(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    write_checkpoint(folder, Checkpoint.of_tensors(whole_tensors() if tensors is None else tensors, METADATA))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "step-00000512")


@pytest.fixture(params=["folder", "file of format 1"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of either format."""
    if request.param == "folder":
        return save(tmp_path / "step-00000512")
    return write_old(tmp_path / "best.safetensors", whole_tensors())


def files_of(saved: Path) -> list[Path]:
    return sorted(saved.iterdir()) if saved.is_dir() else [saved]


def test_every_tensor_and_the_metadata_come_back_unchanged(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert_same(loaded.tensors(), whole_tensors())
    assert loaded.metadata == METADATA == read_metadata(saved)


def test_any_safetensors_reader_finds_the_documented_files(tmp_path: Path) -> None:
    tensors = whole_tensors() | {"optimizer.trained.weight": torch.ones(5, 2)}
    folder = save(tmp_path / "step-00000001", tensors)
    names = {
        "model.safetensors": {"weight", "gain", "none"},
        "optimizer.safetensors": {"weight.exp_avg", "weight.step"},
        "rng.safetensors": {"cpu"},
        "trained.safetensors": {"weight"},
    }
    assert {path.name for path in folder.iterdir()} == {*names, "checkpoint.json"}
    for name, expected in names.items():
        assert set(safetensors.torch.load_file(folder / name)) == expected
    assert_same({"model.weight": safetensors.torch.load_file(folder / "model.safetensors")["weight"]}, {
        "model.weight": tensors["model.weight"]
    })  # fmt: skip
    assert json.loads((folder / "checkpoint.json").read_text())["lumiere_format"] == "2"
    # The average and the trained weights are joined again.
    assert_same(load_checkpoint(folder).tensors(), tensors)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    kind, generator, tensors = getattr(torch, dtype), torch.Generator().manual_seed(1), {}
    for shape in [(), (0,), (3, 0, 2), (1,), (2, 3), (5, 1, 3)]:
        count = torch.Size(shape).numel() * torch.empty(0, dtype=kind).element_size()
        # Random bits: for floats they include NaNs with a payload, which must survive too.
        bits = torch.randint(0, 2 if dtype == "bool" else 256, (count,), dtype=torch.uint8, generator=generator)
        tensors[f"model.{shape}"] = bits.view(kind).reshape(shape)
    assert_same(load_checkpoint(save(tmp_path / "any", tensors)).tensors(), tensors)


def test_strided_and_shared_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    views = {"all": base, "transposed": base.T, "column": base[:, 1], "again": base, "wide": base[:1].expand(5, 4)}
    state = {f"model.{name}": view for name, view in views.items()}
    loaded = load_checkpoint(save(tmp_path / "any", state)).tensors()
    assert_same(loaded, {name: tensor.detach() for name, tensor in state.items()})
    loaded["model.all"].zero_()
    assert loaded["model.again"].sum() == 66
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_only_the_named_groups_are_read(saved: Path) -> None:
    moment = raw_bytes(whole_tensors()["optimizer.weight.exp_avg"])
    for path in files_of(saved):
        path.write_bytes(path.read_bytes().replace(moment, moment[::-1]))
    loaded = load_checkpoint(saved, groups=("model", "rng"))
    assert loaded.optimizer == {}
    assert_same(loaded.rng, {"cpu": whole_tensors()["rng.cpu"]})
    with pytest.raises(CheckpointError, match="optimizer"):
        load_checkpoint(saved)
    with pytest.raises(ValueError, match="optimiser"):
        load_checkpoint(saved, groups=("optimiser",))


def test_only_the_wanted_rows_are_read(folder: Path) -> None:
    asked: dict[str, tuple[int, ...]] = {}

    def rows(name: str, shape: tuple[int, ...]) -> slice:
        asked[name] = shape
        return slice(1, 4) if shape else slice(None)

    loaded = load_checkpoint(folder, rows=rows).tensors()
    expected = whole_tensors()
    assert asked == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert_same(loaded, {name: tensor[1:4] if tensor.dim() else tensor for name, tensor in expected.items()})
    # Files without wanted rows are not even verified.
    flip("rng.safetensors")(folder)
    load_checkpoint(folder, rows=lambda name, shape: slice(0, 0) if name == "rng.cpu" else slice(None))


def test_an_outline_has_everything_but_the_numbers(folder: Path) -> None:
    outline = load_outline(folder, verify=True)
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in outline.tensors().items()}
    assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in whole_tensors().items()}
    assert all(tensor.is_meta for tensor in outline.tensors().values())
    assert (outline.folder, outline.metadata) == (folder, METADATA)
    flip("rng.safetensors")(folder)
    load_outline(folder, verify=False)
    with pytest.raises(CheckpointError, match="rng"):
        load_outline(folder, verify=True)


def test_loaded_tensors_do_not_change_with_the_files(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    for path in files_of(saved):
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert_same(loaded.tensors(), whole_tensors())


def test_any_damaged_byte_and_any_cut_is_noticed(saved: Path) -> None:
    unnoticed = []
    for path in files_of(saved):
        data = path.read_bytes()
        for index in range(0, len(data), 7):
            flipped = bytearray(data)
            flipped[index] ^= 1 << index % 8
            for changed in (bytes(flipped), data[:index], data[:index] + b" " + data[index:]):
                path.write_bytes(changed)
                try:
                    loaded = load_checkpoint(saved)
                except CheckpointError:
                    continue
                # White space between the values of the manifest is not damage.
                if path.suffix != ".json" or loaded.metadata != METADATA:
                    unnoticed.append((path.name, index))
        path.write_bytes(data)
    assert_same(load_checkpoint(saved).tensors(), whole_tensors())
    assert unnoticed == []


@pytest.mark.parametrize("reader", [checkpoint_module, tensor_files])
def test_a_file_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, reader: ModuleType) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reader, "open_file", fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' cannot be read: Input/output error"):
        load_checkpoint(folder)


def test_what_json_cannot_hold_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_checkpoint(tmp_path / "any", Checkpoint({}, metadata={"best_loss": value}))
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_json_turns_into_text_does_not_break_the_hash(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "any", Checkpoint({}, metadata={"steps": {10: (1, 2), 9: 1.5}, "step": 1}))
    assert read_metadata(tmp_path / "any") == {"steps": {"10": [1, 2], "9": 1.5}, "step": 1}


def test_a_disk_without_room_is_noticed_before_the_first_byte(tmp_path: Path) -> None:
    class SmallDisk(Disk):
        asked = 0.0

        def check_room(self, folder: Path, num_bytes: float) -> None:
            self.asked = num_bytes
            super().check_room(folder, shutil.disk_usage(folder).total + 1)

    disk = SmallDisk()
    with pytest.raises(OSError, match="more than are free"):
        write_checkpoint(tmp_path / "any", Checkpoint.of_tensors(whole_tensors(), METADATA), disk=disk)
    # By hand: 10 float32, 3 bfloat16, 10 float64, 1 float32, 3 bytes.
    assert disk.asked == 40 + 6 + 80 + 4 + 3
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        modes = {stat.S_IMODE(path.stat().st_mode) for path in save(tmp_path / "any").iterdir()}
    finally:
        os.umask(before)
    assert modes == {0o640}


@pytest.mark.parametrize(
    ("size", "count", "fits"), [(1000, 1, True), (1001, 1, False), (600, 3, True), (601, 3, False)]
)
def test_tensors_must_fit_into_the_free_memory_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, count: int, fits: bool
) -> None:
    monkeypatch.setattr(tensor_files, "available_memory", lambda: 3000)  # three times the largest, and the others
    save(tmp_path / "any", {f"model.{i}": torch.zeros(size, dtype=torch.uint8) for i in range(count)})
    if fits:
        assert len(load_checkpoint(tmp_path / "any").model) == count
    else:
        with pytest.raises(CheckpointError, match="GB are free"):
            load_checkpoint(tmp_path / "any")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this system does not say how much memory is free")
def test_the_free_memory_is_less_than_all(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = tensor_files.available_memory()
    assert available is not None
    assert 0 < available < total
    real = Path.read_text
    limited = {"/sys/fs/cgroup/memory.max": "4096\n"}  # as in a container
    monkeypatch.setattr(Path, "read_text", lambda path: limited.get(str(path)) or real(path))
    assert tensor_files.available_memory() == 4096


def test_metadata_is_read_without_torch(folder: Path) -> None:
    code = (
        f"import sys; from {checkpoint_module.__name__} import read_metadata\n"
        "print(read_metadata(sys.argv[1])['step'], {'torch'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert result.stdout == "512 set()\n"
