"""A checkpoint in shards comes back whole and bit for bit, by any number of processes, or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.errors import CheckpointError
from lumiere.persistence import shard_writer, sharded
from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint, read_metadata, save_checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import RunStore
from lumiere.persistence.sharded import load_shards, save_shards
from tests.persistence.shards import METADATA, assert_same, flip, make_folder, whole_tensors

GROUPS = ("model", "optimizer", "rng")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Made by hand, as three processes would have written it."""
    return make_folder(tmp_path / "latest")


def of_group(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{group}."): tensor for name, tensor in tensors.items() if name.startswith(f"{group}.")}


def assert_is(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    for group in GROUPS:
        assert_same(getattr(checkpoint, group), of_group(tensors, group))


def as_checkpoint(tensors: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(*(of_group(tensors, group) for group in GROUPS), METADATA)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_made_by_hand_is_read_whole(folder: Path) -> None:
    for loaded in (load_shards(folder), load_checkpoint(folder)):
        assert_is(loaded, whole_tensors())
        assert loaded.metadata == METADATA == read_metadata(folder)


def test_only_the_named_groups_are_read(folder: Path) -> None:
    for name in ("moments-2.safetensors", "steps.safetensors"):
        flip(name)(folder)
    loaded = load_checkpoint(folder, groups=("model", "rng"))
    assert_same(loaded.model, of_group(whole_tensors(), "model"))
    assert_same(loaded.rng, of_group(whole_tensors(), "rng"))
    assert loaded.optimizer == {}
    with pytest.raises(CheckpointError, match=r"moments-2\.safetensors' is damaged: it does not match its hash"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="no group weights in a checkpoint"):
        load_checkpoint(folder, groups=("weights",))


def test_tensors_are_read_into_memory_that_is_there(folder: Path) -> None:
    asked: dict[str, Tensor] = {}

    def like(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        # Not contiguous, and a parameter.
        asked[name] = torch.full((*shape, 2), 9, dtype=dtype)[..., 0]
        return asked[name].requires_grad_(dtype.is_floating_point)

    loaded = load_shards(folder, like=like)
    assert_same({name: tensor.detach() for name, tensor in asked.items()}, whole_tensors())
    assert loaded.model["weight"] is asked["model.weight"]
    for wrong in (torch.empty(2, 5), torch.empty(5, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="the memory is another"):
            load_shards(folder, ("model",), like=lambda name, shape, dtype, wrong=wrong: wrong)


DTYPES = [
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.int8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


def odd_tensors() -> dict[str, Tensor]:
    """All types, with random bits; no dimensions, none of a length, shared memory, memory in columns."""
    generator = torch.Generator().manual_seed(1)
    tensors = whole_tensors()
    for dtype in DTYPES:
        for number, shape in enumerate([(), (0,), (3, 0, 2), (2, 3)]):
            count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
            bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
            tensors[f"model.{dtype}.{number}"] = bits.view(dtype).reshape(shape)
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    views = {"all": base, "again": base, "transposed": base.T, "column": base[:, 1], "wide": base[:1].expand(5, 4)}
    views["alone"] = torch.arange(6.0).reshape(2, 3).T
    return tensors | {f"optimizer.{name}": view for name, view in views.items()}


def test_one_process_saves_what_a_single_file_has(tmp_path: Path) -> None:
    checkpoint = as_checkpoint(odd_tensors())
    save_shards(tmp_path / "best", checkpoint, SINGLE_PROCESS)
    save_checkpoint(tmp_path / "best.safetensors", checkpoint)
    assert names(tmp_path) == {"best", "best.safetensors"}
    expected, loaded = load_checkpoint(tmp_path / "best.safetensors"), load_checkpoint(tmp_path / "best")
    for group in GROUPS:
        assert_same(getattr(loaded, group), getattr(expected, group))
    assert loaded.metadata == expected.metadata == METADATA
    assert not any(tensor.requires_grad for tensor in loaded.optimizer.values())


def test_nothing_in_the_folder_is_pickled_and_torch_reads_it_by_itself(tmp_path: Path) -> None:
    save_shards(tmp_path / "best", as_checkpoint(whole_tensors()), SINGLE_PROCESS)
    assert {name.rpartition(".")[2] for name in names(tmp_path / "best")} == {"safetensors", "json"}
    assert [path for path in (tmp_path / "best").iterdir() if b"\x80\x02" in path.read_bytes()[:100]] == []
    assert json.loads((tmp_path / "best" / "checkpoint.json").read_text())["metadata"] == METADATA
    state = {name: torch.full_like(tensor, 5) for name, tensor in whole_tensors().items()}
    with pytest.warns(UserWarning, match="single process"):
        load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "best")), no_dist=True)
    assert_same(state, whole_tensors())


def test_what_json_does_not_have_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_shards(tmp_path / "best", Checkpoint({}, metadata={"best_loss": float("nan")}), SINGLE_PROCESS)
    assert names(tmp_path) == set()


def test_a_key_that_json_turns_into_text_does_not_break_the_hash(tmp_path: Path) -> None:
    save_shards(tmp_path / "best", Checkpoint({}, metadata={"steps": {10: (1, 2), 9: 1.5}, "step": 1}), SINGLE_PROCESS)
    assert read_metadata(tmp_path / "best") == {"steps": {"10": [1, 2], "9": 1.5}, "step": 1}


def test_a_disk_without_room_is_noticed_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = as_checkpoint(whole_tensors())
    # By hand: 10 float32, 3 bfloat16, 10 float64, 1 float32, 3 bytes.
    needed = 40 + 6 + 80 + 4 + 3
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=needed - 1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", None)
        with pytest.raises(CheckpointError, match=r"best' cannot be written: it takes 0\.0 MB"):
            save_shards(tmp_path / "best", checkpoint, SINGLE_PROCESS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=needed))
    save_shards(tmp_path / "best", checkpoint, SINGLE_PROCESS)
    assert names(tmp_path) == {"best"}


# One process with a group, and several


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def spread(tensor: Tensor, size: int) -> DTensor:
    return distribute_tensor(tensor, init_device_mesh("cpu", (size,)), [Shard(0)])


def spread_out(size: int) -> Checkpoint:
    """As FSDP has it: parameters and moments in rows, the rest plain; one matrix as its transpose has it."""
    tensors = whole_tensors()
    shared = {
        name: spread(tensor, size) if tensor.dim() and not name.startswith("rng") else tensor
        for name, tensor in tensors.items()
    }
    return as_checkpoint(shared)


@pytest.mark.usefixtures("group_of_one")
def test_shards_of_a_world_of_one(tmp_path: Path) -> None:
    save_shards(tmp_path / "latest", spread_out(1), SINGLE_PROCESS)
    assert_is(load_checkpoint(tmp_path / "latest"), whole_tensors())
    loaded = load_shards(
        tmp_path / "latest",
        ("model",),
        lambda name, shape, dtype: spread(torch.full(shape, 9, dtype=dtype), 1),
    )
    assert_same(
        {name: tensor.full_tensor() for name, tensor in loaded.model.items()}, of_group(whole_tensors(), "model")
    )


@pytest.mark.usefixtures("group_of_one")
def test_only_rows_are_shared_out(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))
    weight = torch.arange(10.0).reshape(5, 2)
    whole = distribute_tensor(weight, mesh, [Replicate()])
    save_shards(tmp_path / "best", Checkpoint({"weight": whole}), SINGLE_PROCESS)
    assert_same(load_checkpoint(tmp_path / "best").model, {"weight": weight})
    columns = distribute_tensor(weight, mesh, [Shard(1)])
    with pytest.raises(ValueError, match="a checkpoint takes shards of rows"):
        save_shards(tmp_path / "best", Checkpoint({"weight": columns}), SINGLE_PROCESS)


def fail(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


def in_process(rank: int, size: int, work: Callable[[ProcessGroup, Path], None], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(tmp_path / f"store-{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    work(ProcessGroup(rank, size, rank, size), tmp_path)
    dist.barrier()
    dist.destroy_process_group()


def run_in(size: int, work: Callable[[ProcessGroup, Path], None], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_process, (size, work, tmp_path), nprocs=size)


def memory_like(size: int) -> Callable[[str, torch.Size, torch.dtype], Tensor]:
    def like(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        memory = torch.full(shape, 9, dtype=dtype)
        return spread(memory, size) if shape and not name.startswith("rng") else memory

    return like


def save_by_three(processes: ProcessGroup, tmp_path: Path) -> None:
    """Each attempt that fails does so in every process, and leaves nothing; then one succeeds."""
    checkpoint, folder = spread_out(3), tmp_path / "latest"
    for owner, function, failing_rank in [
        (os, "fsync", 1),  # inside torch's writer
        (shard_writer, "hash_file", 2),
        (sharded, "sync_folder", 0),
        (sharded.shutil, "disk_usage", 0),
        (sharded, "place", 0),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            place = sharded.place
            if function == "place":
                place = fail if processes.rank == failing_rank else place
            elif processes.rank == failing_rank:
                patch.setattr(owner, function, fail)
            with pytest.raises(CheckpointError, match="latest' cannot be written: No space left on device"):
                save_shards(folder, checkpoint, processes, place)
        processes.barrier()
        assert not list(tmp_path.glob("*latest*")), function
    run = RunStore(tmp_path / "runs").all()[0]
    manager = CheckpointManager(tmp_path / "runs")
    for step in (1, 2):
        manager.save_shards(run, "latest", replace(checkpoint, metadata={"step": step}), processes)
    assert [manager.load(run, name).step for name in ("latest", "previous")] == [2, 1]
    processes.barrier()
    save_shards(folder, checkpoint, processes)


def load_by_two(processes: ProcessGroup, tmp_path: Path) -> None:
    """The three's shards by two processes, which save them again, over those of the three."""
    loaded = load_shards(tmp_path / "latest", like=memory_like(2))
    full = {
        f"{group}.{name}": tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for group in GROUPS
        for name, tensor in getattr(loaded, group).items()
    }
    assert_same(full, whole_tensors())
    mine = loaded.model["weight"]
    assert isinstance(mine, DTensor)
    assert_same(
        {"rows": mine.to_local()}, {"rows": whole_tensors()["model.weight"][[slice(3), slice(3, 5)][processes.rank]]}
    )
    processes.barrier()
    # Each process reads, and so verifies, only the files in which rows of its own are.
    for path in (tmp_path / "latest").glob("shard-00003-*"):
        if processes.rank == 0:
            flip(path.name)(tmp_path / "latest")
    processes.barrier()
    try:
        load_shards(tmp_path / "latest", ("model",), memory_like(2))
        refused = False
    except CheckpointError:
        refused = True
    assert refused == (processes.rank == 1)
    processes.barrier()
    save_shards(tmp_path / "latest", loaded, processes)


@pytest.mark.slow
def test_three_processes_save_what_one_and_two_load(tmp_path: Path) -> None:
    run = RunStore(tmp_path / "runs").create()
    (run.checkpoints_dir / ".latest.0a1b2c3d.tmp").mkdir()  # of a save that was killed
    run_in(3, save_by_three, tmp_path)
    assert {path.name for path in run.checkpoints_dir.iterdir()} == {"latest", "previous"}
    save_checkpoint(tmp_path / "single.safetensors", as_checkpoint(whole_tensors()))
    single = load_checkpoint(tmp_path / "single.safetensors")
    for size in (3, 2):
        loaded = load_checkpoint(tmp_path / "latest")
        for group in GROUPS:
            assert_same(getattr(loaded, group), getattr(single, group))
        assert loaded.metadata == single.metadata
        written_by = {path.name.split("-")[1] for path in (tmp_path / "latest").glob("*.safetensors")}
        assert written_by == {f"{rank + 1:05d}" for rank in range(size)}
        if size == 3:
            run_in(2, load_by_two, tmp_path)
    assert not list(tmp_path.glob(".*"))
