"""Which device and precision a name gives, on machines with and without a GPU."""

import pytest
import torch

from lumiere.device import peak_flops, resolve_device, resolve_precision
from lumiere.errors import LumiereError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with so many GPUs; without any unless a test says otherwise."""

    def has(num_gpus: int, bfloat16: bool = True, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        # A GPU without bfloat16 emulates it, slowly; that is not meant.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16
        )
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    has(0)
    return has


def test_auto_is_the_gpu_where_there_is_one(machine) -> None:
    assert resolve_device("auto") == CPU
    machine(2)
    assert resolve_device("auto") == CUDA


def test_a_name_is_that_device(machine) -> None:
    assert resolve_device("cpu") == CPU
    machine(2, mps=True)
    assert resolve_device("cpu") == CPU
    assert resolve_device("cuda") == CUDA
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("mps") == MPS


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
def test_a_missing_device_is_refused_with_those_that_are_there(machine, num_gpus: int, name: str, present: str) -> None:
    machine(num_gpus)
    with pytest.raises(LumiereError) as caught:
        resolve_device(name)
    assert caught.value.message == f"there is no device '{name}'"
    assert caught.value.hint == f"this machine has {present}"


def test_auto_precision_is_bfloat16_only_where_a_gpu_computes_in_it(machine) -> None:
    machine(1, bfloat16=True)
    assert resolve_precision("auto", CUDA) == torch.bfloat16
    machine(1, bfloat16=False)
    assert resolve_precision("auto", CUDA) == torch.float32
    assert resolve_precision("auto", MPS) == torch.float32


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_a_named_precision_is_taken(device: torch.device) -> None:
    assert resolve_precision("float32", device) == torch.float32
    assert resolve_precision("bfloat16", device) == torch.bfloat16


@pytest.mark.parametrize(("gain", "dtype"), [(0.2, torch.float32), (1.3, torch.float32), (1.5, torch.bfloat16)])
def test_auto_precision_of_a_cpu_is_bfloat16_where_its_products_are_much_faster(
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
