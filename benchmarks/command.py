"""Measure what `lumiere train` adds to its own training step: `python benchmarks/command.py`.

Three contenders take turns, each in its own process: the bare step on one batch of random tokens; the command with
its output in a pipe; the command on a terminal, where it draws the progress bar. The table shows the time inside the
step, the time between the starts of two steps (medians, which exclude evaluations and saves), and the fraction of time
spent in Python's garbage collector. Ratios are medians of the rounds' ratios.

    python benchmarks/command.py
    python benchmarks/command.py --config small --set dataset.name=path/to/wikitext --set dataset.subset=wikitext-2-v1
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lumiere.cli import main as lumiere
from lumiere.cli import sleep_while_waiting

WARM_UP_STEPS = 10
BARE, PIPE, TERMINAL = "bare step", "command, pipe", "command, terminal"


class Stopwatch:
    """Wrap a step and record when it runs and how long the garbage collector takes."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self._started: list[float] = []
        self._seconds: list[float] = []
        self._collecting = 0.0
        gc.callbacks.append(self._collect)

    def _collect(self, phase: str, info: dict[str, Any]) -> None:
        self._collecting += time.perf_counter() * (1 if phase == "stop" else -1)

    def __call__(self, *args: Any) -> Any:
        if len(self._started) == WARM_UP_STEPS:
            self._collecting = 0.0
        self._started.append(time.perf_counter())
        result = self._step(*args)
        self._seconds.append(time.perf_counter() - self._started[-1])
        return result

    def save(self, path: str) -> None:
        started = self._started[WARM_UP_STEPS:]
        loops = [after - before for before, after in itertools.pairwise(started)]
        figures = {
            "step": statistics.median(self._seconds[WARM_UP_STEPS:]),
            "loop": statistics.median(loops),
            "collecting": self._collecting / (started[-1] - started[0]),
        }
        Path(path).write_text(json.dumps(figures), encoding="utf-8")


def run_bare(config_name: str, settings: list[str], steps: int, path: str) -> None:
    """Run the step with the command's model, precision and batch size on one batch of random tokens."""
    sleep_while_waiting()
    import torch

    from lumiere.config.loader import load_config
    from lumiere.data.batches import Batch
    from lumiere.device import keep_freed_memory, resolve_precision
    from lumiere.training.loss import summed_loss
    from lumiere.training.state import TrainingState
    from lumiere.training.trainer import train_step

    keep_freed_memory()
    config = load_config(config_name, settings)
    cpu = torch.device("cpu")
    precision = resolve_precision(config.training.precision, cpu)
    state = TrainingState.create(config, cpu, precision)
    state.model.train()
    shape = (config.training.batch_size, config.model.context_size + 1)
    tokens = torch.randint(3, config.tokenizer.vocab_size, shape)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), tokens[:, 1:].numel())
    stopwatch = Stopwatch(train_step)
    for _ in range(steps):
        stopwatch(state, batch, 1.0, config.training, precision, summed_loss)
    stopwatch.save(path)


def run_command(config_name: str, settings: list[str], steps: int, path: str) -> None:
    sleep_while_waiting()  # before torch is imported, as the command does
    from lumiere.training import trainer

    stopwatch = Stopwatch(trainer.train_step)
    trainer.train_step = stopwatch
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["lumiere", "train", config_name, "--max-steps", str(steps), "--runs-dir", folder]
        sys.argv += [f"--set={text}" for text in settings]
        try:
            lumiere()
        finally:
            stopwatch.save(path)


def measured(contender: str, config: str, settings: list[str], steps: int) -> dict[str, float]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--child", contender, "--save", file.name]
        command += ["--config", config, "--steps", str(steps), *(f"--set={text}" for text in settings)]
        if contender == TERMINAL:
            run_on_terminal(command)
        else:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return json.loads(Path(file.name).read_bytes())


def run_on_terminal(command: list[str]) -> None:
    """Run a command on a pseudo-terminal and discard its output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    with contextlib.suppress(OSError):  # how a closed pseudo-terminal reports its end
        while os.read(ours, 65536):
            pass
    os.close(ours)
    if process.wait():
        raise SystemExit(f"{TERMINAL} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="small-fast")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="default: the built-in corpus")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run = run_bare if options.child == BARE else run_command
        run(options.config, options.set, options.steps, options.save)
        return
    settings = options.set or ["dataset.name=stories", "dataset.subset=null", "dataset.document_start=null"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (BARE, PIPE, TERMINAL)}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for name, figures in found.items():
            figures.append(measured(name, options.config, settings, options.steps))
    table = Table("", "step, ms", "loop, ms", "loop / bare step", "garbage collector")
    for name, figures in found.items():
        step, loop, collecting = (
            statistics.median(one[key] for one in figures) for key in ("step", "loop", "collecting")
        )
        ratio = statistics.median(one["loop"] / bare["step"] for one, bare in zip(figures, found[BARE], strict=True))
        table.add_row(name, f"{1e3 * step:.1f}", f"{1e3 * loop:.1f}", f"{ratio:.3f}", f"{collecting:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
