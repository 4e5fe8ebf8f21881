"""Test whether the learning rates and steps of small-fast suit other sizes: `python benchmarks/sizes.py`.

Trains models of 0.3, 1.5 and 9.8 million parameters on the built-in stories with the small-fast recipe, at multiples
of its two learning rates and for several numbers of steps, and prints the final validation losses. Everything takes
some hours; options select a part:

    python benchmarks/sizes.py --sizes 0.3M 1.5M --rates 0.5 1 2 --steps 600
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lumiere.config.loader import load_config

# Width, layers, heads of width 32, neurons.
SIZES = {"0.3M": (64, 4, 2, 160), "1.5M": (160, 4, 5, 400), "9.8M": (352, 6, 11, 960)}
NUM_DOCUMENTS = 60_000  # 2,000 steps see no story twice


def settings(size: str, rate: float, steps: int, seed: int) -> list[str]:
    width, layers, heads, neurons = SIZES[size]
    training = load_config("small-fast", []).training
    return [
        f"model.embedding_size={width}",
        f"model.num_layers={layers}",
        f"model.num_heads={heads}",
        f"model.d_ff={neurons}",
        "tokenizer.vocab_size=2048",
        "dataset.name=stories",
        "dataset.subset=null",
        "dataset.document_start=null",
        f"dataset.num_documents={NUM_DOCUMENTS}",
        f"training.learning_rate={rate * training.learning_rate}",
        f"training.muon_learning_rate={rate * training.muon_learning_rate}",
        f"training.max_steps={steps}",
        "training.eval_interval=null",
        "training.snapshots=false",
        f"training.seed={seed}",
    ]


def trained(size: str, rate: float, steps: int, seed: int) -> tuple[float, float]:
    """Train one model; return its final validation loss in nats per token, and the seconds it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lumiere", "train", "small-fast", "--runs-dir", folder]
        for setting in settings(size, rate, steps, seed):
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    return losses[-1], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 1.0, 2.0], help="x those of small-fast")
    parser.add_argument("--steps", nargs="+", type=int, default=[300, 600, 1200])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = Table("parameters", "steps", "rates", "validation loss", "seconds")
    for size in arguments.sizes:
        for steps in arguments.steps:
            for rate in arguments.rates:
                loss, seconds = trained(size, rate, steps, arguments.seed)
                print(f"{size}, {steps} steps, rates x {rate:g}: {loss:.4f}, {seconds:.0f} s", file=sys.stderr)
                table.add_row(size, f"{steps:,}", f"x {rate:g}", f"{loss:.4f}", f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
