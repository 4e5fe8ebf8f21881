"""Compare one process using all cores with one process per core: `python benchmarks/distributed.py [CONFIG]`.

Trains CONFIG (tiny) for some steps in turns: with one process, with several that hold all weights (ddp), and with
several that hold a shard each (fsdp). Prints tokens per second after the first third, from `metrics.jsonl` (medians
over rounds), their ratio, and the peak memory of a process, torch included. All see the same batches.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from lumiere.distributed import num_cores
from lumiere.persistence.runs import RunStore


class Way(NamedTuple):
    """One way of training a config."""

    num_processes: int
    parallel: str

    def __str__(self) -> str:
        return "1" if self.num_processes == 1 else f"{self.num_processes}, {self.parallel}"


class Measured(NamedTuple):
    """Cost of one training run."""

    tokens_per_second: float
    peak_bytes: float
    """Resident, of the largest of its processes."""


def measure(config: str, way: Way, steps: int, overrides: list[str]) -> Measured:
    """Measure one training run; its first third does not count towards speed."""
    start = [sys.executable, "-m"]
    if way.num_processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(way.num_processes), "-m"]
    settings = [
        f"training.max_steps={steps}",
        f"training.log_interval={max(1, steps // 12)}",
        f"training.parallel={way.parallel}",
        "training.snapshots=false",
    ]
    options = [word for setting in [*settings, *overrides] for word in ("--set", setting)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [*start, "lumiere", "train", config, "--runs-dir", runs_dir, *options]
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment, stdout=null, stderr=null)
        _, status, usage = os.wait4(process.pid, 0)  # of the process and all children it has waited for
        if status:
            raise SystemExit(f"failed: {' '.join(command)}")
        written = map(json.loads, RunStore(runs_dir).open("latest").metrics_path.read_text().splitlines())
        speeds = [line["tokens_per_second"] for line in written if "loss" in line]
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(statistics.median(speeds[len(speeds) // 3 :]), usage.ru_maxrss * unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="tiny")
    parser.add_argument("--processes", type=int, default=num_cores())
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    ways = [Way(1, "ddp"), Way(options.processes, "ddp"), Way(options.processes, "fsdp")]
    found: dict[Way, list[Measured]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, measured in found.items():
            measured.append(measure(options.config, way, options.steps, options.overrides))
    alone = statistics.median(one.tokens_per_second for one in found[ways[0]])
    table = Table("processes", "tokens/s, median", "lowest", "highest", f"of one with {num_cores()} threads", "memory")
    for way, measured in found.items():
        speeds = [one.tokens_per_second for one in measured]
        median = statistics.median(speeds)
        memory = max(one.peak_bytes for one in measured)
        figures = (f"{figure:,.0f}" for figure in (median, min(speeds), max(speeds)))
        table.add_row(str(way), *figures, f"{median / alone:.2f}", f"{memory / 1e6:,.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    main()
