"""One process with all cores beside one process a core: `python benchmarks/distributed.py [CONFIG]`.

Trains CONFIG (tiny) for some steps each way, in turns, and prints the tokens per second after the first third, as
`metrics.jsonl` has them: medians over the rounds, and their ratio. Both ways see the same batches.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from rich.console import Console
from rich.table import Table

from lumiere.persistence.runs import RunStore
from lumiere.training.processes import num_cores


def tokens_per_second(config: str, num_processes: int, steps: int, overrides: list[str]) -> float:
    """Of one training, its first third left out."""
    start = [sys.executable, "-m"]
    if num_processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m"]
    settings = [
        f"training.max_steps={steps}",
        f"training.log_interval={max(1, steps // 12)}",
        "training.snapshots=false",
    ]
    options = [word for setting in [*settings, *overrides] for word in ("--set", setting)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [*start, "lumiere", "train", config, "--runs-dir", runs_dir, *options]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        written = map(json.loads, RunStore(runs_dir).open("latest").metrics_path.read_text().splitlines())
        speeds = [line["tokens_per_second"] for line in written if "loss" in line]
    return statistics.median(speeds[len(speeds) // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="tiny")
    parser.add_argument("--processes", type=int, default=num_cores())
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], options.processes: []}
    for _ in range(options.rounds):
        for num_processes, measured in speeds.items():
            measured.append(tokens_per_second(options.config, num_processes, options.steps, options.overrides))
    table = Table("processes", "tokens/s, median", "lowest", "highest")
    for num_processes, measured in speeds.items():
        figures = (statistics.median(measured), min(measured), max(measured))
        table.add_row(str(num_processes), *(f"{figure:,.0f}" for figure in figures))
    console = Console()
    console.print(table)
    ratio = statistics.median(speeds[options.processes]) / statistics.median(speeds[1])
    console.print(f"{options.processes} processes: {ratio:.2f} times the tokens of one with {num_cores()} threads")


if __name__ == "__main__":
    main()
