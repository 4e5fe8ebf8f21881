"""A checkpoint that several processes wrote comes back whole and bit for bit, by any number of processes."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

from lumiere.distributed import SINGLE_PROCESS, ProcessGroup, rows_of
from lumiere.errors import CheckpointError
from lumiere.files import Disk
from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint, load_outline, read_metadata
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.checkpoint_writer import together, write_checkpoint
from lumiere.persistence.runs import Run, RunStore
from tests.persistence.shards import METADATA, assert_same, flip, make_folder, whole_tensors


@pytest.mark.parametrize("number", ["1", "2"])
def test_a_folder_made_by_hand_is_read_whole(tmp_path: Path, number: str) -> None:
    folder = make_folder(tmp_path / "latest", number=number)
    loaded = load_checkpoint(folder)
    assert_same(loaded.tensors(), whole_tensors())
    assert loaded.metadata == METADATA == read_metadata(folder)


def test_rows_are_read_across_files_and_only_from_those_that_hold_them(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "latest")
    for name in ("shard-3.safetensors", "moments-2.safetensors"):
        flip(name)(folder)

    def rows(name: str, shape: tuple[int, ...]) -> slice:
        return slice(1, 4) if len(shape) == 2 else slice(0, 0) if name == "model.gain" else slice(None)

    expected = whole_tensors()
    for name, tensor in expected.items():
        expected[name] = tensor[rows(name, tensor.shape)] if tensor.dim() else tensor
    assert_same(load_checkpoint(folder, rows=rows).tensors(), expected)
    with pytest.raises(CheckpointError, match="shard-3"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"shard-3|moments-2"):
        load_outline(folder, verify=True)


def test_nothing_is_pickled_and_torch_reads_the_folder_by_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "best", Checkpoint.of_tensors(whole_tensors(), METADATA), SINGLE_PROCESS)
    paths = list((tmp_path / "best").iterdir())
    assert {path.suffix for path in paths} == {".safetensors", ".json"}
    assert [path for path in paths if b"\x80\x02" in path.read_bytes()[:100]] == []
    state = {name: torch.full_like(tensor, 5) for name, tensor in whole_tensors().items()}
    with pytest.warns(UserWarning, match="single process"):
        load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "best")), no_dist=True)
    assert_same(state, whole_tensors())


# One process with a group, and several


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    store = FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def spread_out(size: int) -> Checkpoint:
    """Shard parameters and moments by rows, as FSDP does; the rest is plain."""
    mesh = init_device_mesh("cpu", (size,))
    tensors: Mapping[str, Tensor] = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() and not name.startswith("rng") else tensor
        for name, tensor in whole_tensors().items()
    }
    return Checkpoint.of_tensors(tensors, METADATA)


@pytest.mark.usefixtures("group_of_one")
def test_only_rows_may_be_sharded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "latest", spread_out(1), SINGLE_PROCESS)
    assert_same(load_checkpoint(tmp_path / "latest").tensors(), whole_tensors())
    columns = distribute_tensor(torch.ones(5, 2), init_device_mesh("cpu", (1,)), [Shard(1)])
    with pytest.raises(ValueError, match="rows"):
        write_checkpoint(tmp_path / "best", Checkpoint({"weight": columns}), SINGLE_PROCESS)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), CheckpointError("damaged")])
def test_no_process_waits_for_one_that_failed(error: Exception) -> None:
    """A process that fails still tells the others, whichever error it has."""
    sent: list[int] = []

    class Recording(ProcessGroup):
        def all_reduce_max(self, value: int) -> int:
            sent.append(value)
            return value

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        together(Recording(), fail)
    assert sent == [errno.ENOSPC if isinstance(error, OSError) else errno.EIO]


class BrokenDisk(Disk):
    """Fails in one operation."""

    def __init__(self, operation: str) -> None:
        def fail(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        setattr(self, operation, fail)


def in_process(rank: int, size: int, work: Callable[[ProcessGroup, Path], None], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = FileStore(str(tmp_path / f"store-{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    work(ProcessGroup(rank, size, rank, size), tmp_path)
    dist.barrier()
    dist.destroy_process_group()


def run_in(size: int, work: Callable[[ProcessGroup, Path], None], tmp_path: Path) -> None:
    spawn(in_process, (size, work, tmp_path), nprocs=size)


def save_by_three(processes: ProcessGroup, tmp_path: Path) -> None:
    """Fail in every process because one fails, and leave nothing; then succeed."""
    checkpoint = spread_out(3)
    run = RunStore(tmp_path / "runs").all()[0]
    for operation, failing_rank in [("write_tensors", 1), ("check_room", 0), ("write", 0), ("sync", 2), ("rename", 0)]:
        disk = BrokenDisk(operation) if processes.rank == failing_rank else Disk()
        with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
            CheckpointManager().save(Run(run.path, disk), "latest", checkpoint, processes)
        processes.barrier()
        assert not list(run.checkpoints_dir.iterdir()), operation
        processes.barrier()
    manager = CheckpointManager(tmp_path / "runs")
    for step in (1, 2):
        state = Checkpoint.of_tensors(checkpoint.tensors(), METADATA | {"step": step})
        manager.save(run, ["best", "latest"], state, processes)
    assert [manager.load(run, name).step for name in ("latest", "previous", "best")] == [2, 1, 2]


def load_by_two(processes: ProcessGroup, tmp_path: Path) -> None:
    """Read the rows that each of two processes holds; only the files that hold them matter."""
    run = RunStore(tmp_path / "runs").all()[0]
    folder = run.checkpoints_dir / "step-00000002"

    def rows(name: str, shape: tuple[int, ...]) -> slice:
        return rows_of(shape[0], processes.rank, 2) if shape and not name.startswith("rng") else slice(None)

    expected = {
        name: tensor[rows(name, tensor.shape)] if tensor.dim() else tensor for name, tensor in whole_tensors().items()
    }
    assert_same(load_checkpoint(folder, rows=rows).tensors(), expected)
    mesh = init_device_mesh("cpu", (2,))
    again = {
        name: DTensor.from_local(expected[name], mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride())
        if tensor.dim() and not name.startswith("rng")
        else tensor
        for name, tensor in whole_tensors().items()
    }
    state = Checkpoint.of_tensors(again, METADATA | {"step": 2})
    CheckpointManager(tmp_path / "runs").save(run, "best", state, processes)
    processes.barrier()
    if processes.rank == 0:
        for path in folder.glob("shard-00003-*"):
            flip(path.name)(folder)
    processes.barrier()
    try:
        load_checkpoint(folder, ("model",), rows)
        refused = False
    except CheckpointError:
        refused = True
    assert refused == (processes.rank == 1)


@pytest.mark.slow
def test_three_processes_save_what_one_and_two_load(tmp_path: Path) -> None:
    run = RunStore(tmp_path / "runs").create()
    run_in(3, save_by_three, tmp_path)
    assert {path.name for path in run.checkpoints_dir.iterdir()} == {"step-00000001", "step-00000002", "pointers.json"}
    folder = run.checkpoints_dir / "step-00000002"
    assert {path.name.split("-")[1] for path in folder.glob("*.safetensors")} == {"00001", "00002", "00003"}
    assert_same(load_checkpoint(folder).tensors(), whole_tensors())
    run_in(2, load_by_two, tmp_path)
    # The same step, and other files: another folder.
    assert_same(CheckpointManager(tmp_path / "runs").load(run, "best").tensors(), whole_tensors())
    names = {"step-00000001", "step-00000002", "step-00000002-2", "pointers.json"}
    assert {path.name for path in run.checkpoints_dir.iterdir()} == names
