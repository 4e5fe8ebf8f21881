"""Every command that computes runs on a device without float64 (Apple's mps has none), and gives what the CPU gives."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lumiere import device as device_module
from lumiere.config.schema import RunConfig
from lumiere.generation import text as text_module
from lumiere.persistence.runs import Run, RunStore
from tests.accelerator import DEVICE, Accelerator
from tests.cli.commands import invoke, read_json


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside of it, `--device mps` is there."""
    resolve = device_module.resolve_device

    def resolved(name: str) -> torch.device:
        return DEVICE if name == "mps" else resolve(name)

    monkeypatch.setattr(device_module, "resolve_device", resolved)
    monkeypatch.setattr(text_module, "resolve_device", resolved)
    monkeypatch.setattr(device_module, "peak_flops", lambda device, precision: 1e12)  # seconds of work
    # In inference mode torch asks modes like this one about other operations than it does elsewhere.
    monkeypatch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())
    with Accelerator():
        yield


def test_it_has_no_float64() -> None:
    tensor = torch.ones(3).to(DEVICE)
    assert tensor.device == DEVICE
    assert (tensor.cpu().double() * 2).sum().item() == 6
    for forbidden in (
        tensor.double,
        lambda: tensor.sum(dtype=torch.float64),
        lambda: torch.ones(3).double().to(DEVICE),
    ):
        with pytest.raises(TypeError):
            forbidden()
    with pytest.raises(AssertionError):
        _ = tensor + torch.ones(3)


UNLIKE = {"device", "seconds", "receipts", "time", "tokens_per_second", "mfu"}
"""What says where and when figures were computed, and by how much they are off."""


def assert_same(found: Any, expected: Any) -> None:
    """The same figures but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected.keys() - UNLIKE:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    else:
        assert found == expected


COMMANDS = (
    "eval {run}",
    "generate --run {run} -n 6 --seed 1 --temperature 0.7 --top-p 0.9 --logprobs 2",
    "generate --run {run} -n 6 --seed 1 --typical-p 0.9 --num-return-sequences 2",
    "generate --run {run} -n 6 --num-beams 2",
    "inspect summary --run {run} --windows 8",
    "inspect attention --run {run} --prompt cat",
    "inspect heads --run {run}",
    "inspect lens --run {run} --prompt cat",
    "inspect logits --run {run} --prompt cat",
    "inspect ablate --run {run} --layer 0 --mode mean",
    "inspect tokens --run {run} --prompt cat",
    pytest.param("inspect dynamics --run {run}", marks=pytest.mark.slow),
    "inspect diff {run} {run}@step-00000000",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_gives_what_it_gives_on_the_cpu(trained_run: Run, command: str) -> None:
    command = command.format(run=trained_run.id) + f" --runs-dir {trained_run.path.parent} --device "
    assert_same(*(read_json(*(command + device).split()) for device in ("mps", "cpu")))


@pytest.mark.slow
def test_a_report_is_written(trained_run: Run, tmp_path: Path) -> None:
    command = f"inspect report --run {trained_run.id} --runs-dir {trained_run.path.parent} -o report.html --device mps"
    invoke(*command.split())
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "gradient_clip_norm": 0.1},
        {"optimizer": "muon", "ema_decay": 0.9, "gradient_accumulation_steps": 2, "activation_checkpointing": True},
    ],
)
def test_a_training_gives_what_it_gives_on_the_cpu(tiny_config: RunConfig, changes: dict[str, Any]) -> None:
    values = tiny_config.model_dump()
    values["model"]["dropout"] = 0.0
    values["dataset"]["num_documents"] = 2
    values["training"] |= changes | {"max_steps": 2, "warmup_steps": 1, "eval_interval": None, "log_interval": 1}
    Path("config.yaml").write_text(yaml.safe_dump(values))
    lines = {}
    for device in ("mps", "cpu"):
        invoke("train", "config.yaml", "--device", device, "--runs-dir", device)
        metrics = RunStore(device).open("latest").metrics_path.read_text().splitlines()
        lines[device] = [json.loads(line) for line in metrics]
    assert_same(lines["mps"], lines["cpu"])
