"""What the environment says, and a world of one."""

import pytest
import torch

from lumiere.components.world import ALONE, World

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}


def test_the_world_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert World.of_environment() == World(rank=5, size=8, local_rank=1, local_size=4)


@pytest.mark.parametrize("name", TORCHRUN)
def test_without_all_of_it_a_process_is_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Other programs set some of these names too."""
    for other, value in TORCHRUN.items():
        monkeypatch.setenv(other, value)
    monkeypatch.delenv(name)
    assert World.of_environment() == ALONE


def test_alone_everything_is_what_it_was() -> None:
    values = torch.tensor([1.0, 2.0])
    assert ALONE.add(values) is values
    assert ALONE.total(0.1) == 0.1
    assert ALONE.largest(3) == 3
    assert ALONE.announce("text") == "text"
    ALONE.copy_from_first(values)
    ALONE.wait()
    assert values.tolist() == [1.0, 2.0]
