"""The bar of a training: everything that it says fits on a narrow terminal."""

import io

import pytest
from rich.console import Console

from lumiere.cli import progress
from lumiere.cli.progress import TrainingProgress
from lumiere.training.events import StartEvent, StepEvent


@pytest.mark.parametrize(
    ("step", "total_steps", "loss", "speed", "mfu", "figures"),
    [
        (10, 1600, 4.4184, 17_500.4, 0.4149, "loss 4.418  lr 3.0e-04  17,500 tok/s  41% mfu"),
        (444_499, 444_500, 10.9996, 1_234_567, 0.4149, "loss 11.000  lr 3.0e-04  1,234,567 tok/s  41% mfu"),
    ],
)
def test_the_bar_fits_into_80_columns(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    total_steps: int,
    loss: float,
    speed: float,
    mfu: float,
    figures: str,
) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, soft_wrap=True, highlight=False)
    monkeypatch.setattr(progress, "stderr", lambda: terminal)
    display = TrainingProgress()
    display(StartEvent("run_a", 0, total_steps, 178, 1_188_992, 5_696, "cpu", "float32", 1.45e11))
    display(StepEvent(step, step / 178, 2000 * step, 0.1 * step, loss, 3e-4, 1.0, speed, mfu))
    plain = Console(file=io.StringIO(), width=80)
    plain.print(display._bar)
    assert isinstance(plain.file, io.StringIO)
    (line,) = plain.file.getvalue().splitlines()
    assert f"{step}/{total_steps} {figures} " in line
    assert line.rstrip().endswith(":--"), "the time that is left is there in full"
    assert isinstance(terminal.file, io.StringIO)
    assert "float32 on cpu (peak 145 GFLOP/s)" in terminal.file.getvalue()
