"""Measure the effect of thread spinning on a busy machine: `python benchmarks/waiting.py`.

PyTorch's threads wait for each other after every operation. GNU OpenMP first lets them spin for some milliseconds,
which is fastest on an idle machine; if another program needs the core, spinning takes the time in which it would have
finished. Measures training steps of the original model card's model in the precision that `auto` selects, alone and
next to as many busy processes as there are cores, for several values of GOMP_SPINCOUNT. 300,000 is OpenMP's default,
`lumiere.cli.SPIN_COUNT` that of Lumiere. `--forward` measures forward passes instead.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table


def measure(seconds: float, forward: bool) -> float:
    """Return the median milliseconds of a step of 32 windows, or of its forward pass, in this process."""
    import torch

    from lumiere.config.loader import load_config
    from lumiere.data.batches import Batch
    from lumiere.device import keep_freed_memory, resolve_precision
    from lumiere.training.loss import summed_loss
    from lumiere.training.state import TrainingState
    from lumiere.training.trainer import train_step

    keep_freed_memory()
    cpu = torch.device("cpu")
    config = load_config("small-fast")
    precision = resolve_precision(config.training.precision, cpu)
    state = TrainingState.create(config, cpu, precision)
    tokens_BT = torch.randint(3, 4096, (32, 65))
    batch = Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous(), 32 * 64)

    def run() -> None:
        if forward:
            with torch.inference_mode():
                state.model.logits(batch.tokens)
        else:
            train_step(state, batch, 1.0, config.training, precision, summed_loss)

    times = []
    run()
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measured(spin_count: int, seconds: float, forward: bool) -> float:
    command = [sys.executable, __file__, "--measure", "--seconds", str(seconds), *["--forward"] * forward]
    environment = os.environ | {"GOMP_SPINCOUNT": str(spin_count)}
    return float(subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout)


def be_busy() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--spin-counts", nargs="+", type=int, default=[300_000, 10_000, 3_000, 1_000, 0])
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forward", action="store_true", help="forward passes instead of training steps")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.seconds, options.forward))
        return
    table = Table("GOMP_SPINCOUNT", "alone, ms", "busy machine, ms")
    times: dict[tuple[int, int], list[float]] = {}
    cores = os.cpu_count() or 1
    for busy in (0, cores):
        others = [multiprocessing.Process(target=be_busy, daemon=True) for _ in range(busy)]
        for other in others:
            other.start()
        for _ in range(options.repeats):
            for count in options.spin_counts:
                times.setdefault((count, busy), []).append(measured(count, options.seconds, options.forward))
        for other in others:
            other.kill()
    for count in options.spin_counts:
        alone, busy = (statistics.median(times[count, others]) for others in (0, cores))
        table.add_row(f"{count:,}", f"{alone:.1f}", f"{busy:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
