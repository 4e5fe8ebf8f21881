"""Devices, precisions and process groups, as the machine and the environment give them."""

import pytest
import torch

from lumiere.device import peak_flops, resolve_device, resolve_precision
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.errors import LumiereError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with a number of GPUs; without any unless a test says otherwise."""

    def has(num_gpus: int, bfloat16: bool = True, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        # A GPU without bfloat16 emulates it slowly, which does not count.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16
        )
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    has(0)
    return has


def test_a_name_is_that_device_and_auto_the_gpu_if_there_is_one(machine) -> None:
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    machine(2, mps=True)
    names = {"auto": CUDA, "cpu": CPU, "cuda": CUDA, "cuda:1": torch.device("cuda", 1), "mps": MPS}
    assert {name: resolve_device(name) for name in names} == names


@pytest.mark.parametrize(
    ("num_gpus", "name", "present"),
    [
        (0, "cuda", "cpu"),
        (0, "cuda:0", "cpu"),
        (0, "mps", "cpu"),
        (1, "cuda:1", "cuda:0, cpu"),
        (2, "cuda:2", "cuda:0, cuda:1, cpu"),
        (0, "tpu", "cpu"),
    ],
)
def test_a_missing_device_is_refused_with_those_present(machine, num_gpus: int, name: str, present: str) -> None:
    machine(num_gpus)
    with pytest.raises(LumiereError, match=f"'{name}'") as caught:
        resolve_device(name)
    assert str(caught.value.hint).endswith(f" {present}")


def test_auto_precision_is_bfloat16_only_on_a_gpu_that_computes_in_it(machine) -> None:
    machine(1, bfloat16=True)
    assert resolve_precision("auto", CUDA) == torch.bfloat16
    machine(1, bfloat16=False)
    assert resolve_precision("auto", CUDA) == resolve_precision("auto", MPS) == torch.float32
    for device in (CPU, CUDA, MPS):
        assert resolve_precision("float32", device) == torch.float32
        assert resolve_precision("bfloat16", device) == torch.bfloat16


@pytest.mark.parametrize(("gain", "dtype"), [(0.2, torch.float32), (1.3, torch.float32), (1.5, torch.bfloat16)])
def test_auto_precision_of_a_cpu_is_bfloat16_if_its_products_are_much_faster(
    monkeypatch: pytest.MonkeyPatch, gain: float, dtype: torch.dtype
) -> None:
    speeds = {torch.float32: 2e11, torch.bfloat16: gain * 2e11}
    monkeypatch.setattr("lumiere.device.peak_flops", lambda device, dtype: speeds[dtype])
    assert resolve_precision("auto", CPU) == dtype


def test_peak_flops_counts_a_multiplication_and_an_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 25.0])
    monkeypatch.setattr("lumiere.device.time.perf_counter", lambda: next(clock))
    # The best of the products took 2 s; a product of size n has n^3 multiplications.
    assert peak_flops(CPU, torch.float32) == 512**3 * 2 / 2.0


@pytest.mark.parametrize("missing", [None, *TORCHRUN])
def test_the_process_group_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    """Other programs set some of these names too, so without all of them a process is alone."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    if missing is not None:
        monkeypatch.delenv(missing)
    expected = ProcessGroup(rank=5, size=8, local_rank=1, local_size=4) if missing is None else SINGLE_PROCESS
    assert ProcessGroup.from_environment() == expected


def test_a_single_process_gets_back_what_it_gives() -> None:
    values = torch.tensor([1.0, 2.0])
    assert SINGLE_PROCESS.all_reduce_tensor(values) is values
    assert SINGLE_PROCESS.all_reduce_sum(0.1) == 0.1
    assert SINGLE_PROCESS.all_reduce_max(3) == 3
    assert SINGLE_PROCESS.broadcast_text("text") == "text"
    SINGLE_PROCESS.barrier()
    assert values.tolist() == [1.0, 2.0]
