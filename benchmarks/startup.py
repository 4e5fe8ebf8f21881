"""Time the light commands as whole processes: `python benchmarks/startup.py`.

Prints medians of interleaved repeats, next to the start-up of Python and the import of torch on this machine.
Requirements: `lumiere runs ls` with 1,000 runs takes less than 0.3 s, also if one has 1 GB of metrics; a missing
network is reported within 5 s.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lumiere.persistence.notes import add_tags
from lumiere.persistence.runs import RunStore

NUM_RUNS = 1000
LINES_PER_RUN = 200
REPEATS = 9
LUMIERE = [sys.executable, "-m", "lumiere"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    "lumiere --help": [*LUMIERE, "--help"],
    f"lumiere runs ls ({NUM_RUNS:,} runs)": [*LUMIERE, "runs", "ls"],
    f"lumiere runs ls --json ({NUM_RUNS:,} runs)": [*LUMIERE, "runs", "ls", "--json"],
    "lumiere runs ls --sort loss -n 20": [*LUMIERE, "runs", "ls", "--sort", "loss", "-n", "20"],
    "lumiere train small (no network)": [*LUMIERE, "train", "small"],
}


def metrics(num_lines: int) -> bytes:
    """Return metrics lines like those of a real run, every twentieth an evaluation."""
    lines = []
    for i in range(num_lines):
        step, loss = 10 * (i + 1), 4 + 4 / (1 + i / 10)
        record = {"step": step, "epoch": step / 1690, "tokens": 1900 * step, "time": 0.1 * step}
        training = {"loss": loss, "learning_rate": 3e-4, "grad_norm": 1.25, "tokens_per_second": 17500.4, "mfu": 0.4149}
        evaluation = {"val_loss": loss, "val_perplexity": 82.93, "val_bits_per_byte": 1.8}
        lines.append(json.dumps(record | (evaluation if i % 20 == 19 else training)))
    return "\n".join([*lines, ""]).encode()


def make_runs(folder: Path) -> None:
    """Create a thousand finished runs with realistic records, metrics and tags; the last has 1 GB of metrics."""
    record = {
        "status": "finished",
        "num_parameters": 1_188_992,
        "total_steps": 2000,
        "step": 2000,
        "best_loss": 4.418,
        "dataset": "Salesforce/wikitext",
        "command": ["lumiere", "train", "small"],
        "versions": {"torch": "2.13.0", "datasets": "5.2.0"},
        "machine": {"host": "laptop", "cpus": 2},
    }
    store = RunStore(folder / "runs")
    usual = metrics(LINES_PER_RUN)
    run = store.create()
    for i in range(NUM_RUNS):
        run = run if i == 0 else store.create()
        run.record_path.write_text(json.dumps(record, indent=2), encoding="utf-8")
        run.metrics_path.write_bytes(usual)
        if i % 10 == 0:
            add_tags(run, ["baseline"])
    with open(run.metrics_path, "wb") as file:
        for _ in range(1_000_000_000 // len(usual)):
            file.write(usual)


def seconds(command: list[str], folder: Path) -> float:
    # A closed port, which fails as fast as a machine without a network.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder)}
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_runs(folder)
        times: dict[str, list[float]] = {label: [] for label in COMMANDS}
        for _ in range(REPEATS):
            for label, command in COMMANDS.items():
                times[label].append(seconds(command, folder))
    print(f"{'seconds':34}  {'median':>7}  {'least':>7}  {'most':>7}")
    for label, values in times.items():
        print(f"{label:34}  {statistics.median(values):7.3f}  {min(values):7.3f}  {max(values):7.3f}")


if __name__ == "__main__":
    main()
