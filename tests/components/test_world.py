"""What the environment says, and a group of one process."""

import pytest
import torch

from lumiere.distributed import SINGLE_PROCESS, ProcessGroup

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}


def test_the_world_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert ProcessGroup.from_environment() == ProcessGroup(rank=5, size=8, local_rank=1, local_size=4)


@pytest.mark.parametrize("name", TORCHRUN)
def test_without_all_of_it_a_process_is_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Other programs set some of these names too."""
    for other, value in TORCHRUN.items():
        monkeypatch.setenv(other, value)
    monkeypatch.delenv(name)
    assert ProcessGroup.from_environment() == SINGLE_PROCESS


def test_alone_everything_is_what_it_was() -> None:
    values = torch.tensor([1.0, 2.0])
    assert SINGLE_PROCESS.all_reduce_tensor(values) is values
    assert SINGLE_PROCESS.all_reduce_sum(0.1) == 0.1
    assert SINGLE_PROCESS.all_reduce_max(3) == 3
    assert SINGLE_PROCESS.broadcast_text("text") == "text"
    SINGLE_PROCESS.barrier()
    assert values.tolist() == [1.0, 2.0]
