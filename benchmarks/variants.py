"""Measure architecture variants with the small-fast recipe: `python benchmarks/variants.py DATASET`.

DATASET is a local folder of WikiText-2. Trains one epoch of `wikitext-2-v1` with the architecture of the original
model card, with rotary positions, with normalized queries and keys (Henry et al. 2020, "Query-Key Normalization for
Transformers", without its learned scale; patched in here, not a setting of Lumiere), and with both, and prints the
final validation losses. Each takes some minutes; variants can be selected by name.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lumiere.cli import main as lumiere
from lumiere.components.layers import Attention
from lumiere.persistence.metrics import read_metrics

VARIANTS = {
    "card": ("learned", False),
    "rotary": ("rotary", False),
    "qk-norm": ("learned", True),
    "rotary-qk-norm": ("rotary", True),
}


def normalize_queries_and_keys() -> None:
    """Divide each head's query and key by its root mean square, before rotation."""
    initialize = Attention.__init__

    def normalized(x_BTHK: Tensor) -> Tensor:
        return F.rms_norm(x_BTHK, x_BTHK.shape[-1:])

    def initialize_normalized(self: Attention, embedding_size: int, num_heads: int, d_key: int, d_value: int) -> None:
        initialize(self, embedding_size, num_heads, d_key, d_value)
        self.hook_q.hook = self.hook_k.hook = normalized

    Attention.__init__ = initialize_normalized


def command(variant: str, dataset: str, seed: int, epochs: int, runs_dir: str) -> list[str]:
    positions, _ = VARIANTS[variant]
    settings = [
        f"dataset.name={dataset}",
        "dataset.subset=wikitext-2-v1",
        f"model.positions={positions}",
        f"training.max_epochs={epochs}",
        f"training.seed={seed}",
        "training.snapshots=false",
    ]
    return ["train", "small-fast", "--runs-dir", runs_dir, *(part for text in settings for part in ("--set", text))]


def trained(variant: str, dataset: str, seed: int, epochs: int) -> float:
    """Train in a separate process; return the final validation loss in nats per token."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [variant, *command(variant, dataset, seed, epochs, folder)]
        subprocess.run([sys.executable, __file__, "--in-process", *arguments], check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*/metrics.jsonl")
        return [line["val_loss"] for line in read_metrics(path) if "val_loss" in line][-1]


def main() -> None:
    if sys.argv[1:2] == ["--in-process"]:
        variant, *arguments = sys.argv[2:]
        if VARIANTS[variant][1]:
            normalize_queries_and_keys()
        sys.argv = ["lumiere", *arguments]
        lumiere()
        return
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
