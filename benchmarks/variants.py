"""Measure architecture variants with the small-fast recipe: `python benchmarks/variants.py DATASET`.

DATASET is a local folder of WikiText-2. Trains one epoch of `wikitext-2-v1` with the architecture of the original
model card, with rotary positions, with normalized queries and keys, and with both, and prints the final validation
losses. Each takes some minutes; variants can be selected by name.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lumiere.persistence.metrics import read_metrics

VARIANTS = {
    "card": (),
    "rotary": ("model.positions=rotary",),
    "qk-norm": ("model.query_key_norm=true",),
    "rotary-qk-norm": ("model.positions=rotary", "model.query_key_norm=true"),
}


def command(variant: str, dataset: str, seed: int, epochs: int, runs_dir: str) -> list[str]:
    settings = [
        f"dataset.name={dataset}",
        "dataset.subset=wikitext-2-v1",
        *VARIANTS[variant],
        f"training.max_epochs={epochs}",
        f"training.seed={seed}",
        "training.snapshots=false",
    ]
    return ["train", "small-fast", "--runs-dir", runs_dir, *(part for text in settings for part in ("--set", text))]


def trained(variant: str, dataset: str, seed: int, epochs: int) -> float:
    """Train in a separate process; return the final validation loss in nats per token."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = command(variant, dataset, seed, epochs, folder)
        subprocess.run([sys.executable, "-m", "lumiere", *arguments], check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*/metrics.jsonl")
        return [line["val_loss"] for line in read_metrics(path) if "val_loss" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("dataset")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    table = Table("variant", "seed", "validation loss")
    for variant in options.variants:
        for seed in options.seeds:
            loss = trained(variant, str(Path(options.dataset).absolute()), seed, options.epochs)
            print(f"{variant}, seed {seed}: {loss:.4f}", file=sys.stderr)
            table.add_row(variant, str(seed), f"{loss:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
