"""Test whether growing the batch size during training pays: `python benchmarks/batch_growth.py DATASET`.

DATASET is a local folder of WikiText-2. Trains one epoch of `wikitext-2-v1` with the small-fast recipe, changes the
batch size at equal distances in the text (Smith et al. 2018, "Don't Decay the Learning Rate, Increase the Batch Size",
but with the recipe's decay), and prints the final validation losses. Every window is seen once, in the same order, at
the learning rate of its position. Lumiere has no setting for growing batches.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lumiere.config.loader import load_config
from lumiere.data.batches import batch_at
from lumiere.evaluation.loss import evaluate
from lumiere.training.loss import summed_loss
from lumiere.training.schedule import learning_rate_factor
from lumiere.training.setup import TrainingSetup, set_up
from lumiere.training.state import TrainingState
from lumiere.training.trainer import train_step

PLANS = ("32", "16-32", "16-32-64", "32-64", "64")


def trained(setup: TrainingSetup, sizes: list[int]) -> tuple[int, float]:
    """Train one epoch with these batch sizes in order; return its steps and final validation loss."""
    config, settings = setup.config, setup.config.training
    windows = setup.corpus.windows("train", config)
    state = TrainingState.create(config, setup.device, setup.precision)
    state.model.train()
    total_steps = setup.epoch_steps
    # Change where a batch of any size can begin.
    unit = max(sizes)
    ends = [len(windows) * number // len(sizes) // unit * unit for number in range(1, len(sizes))] + [len(windows)]
    seen = 0
    for size, end in zip(sizes, ends, strict=True):
        while seen < end:
            batch = batch_at(seen // size, windows, size, settings.seed)
            place = min(total_steps, -(-(seen + size) // settings.batch_size))
            factor = learning_rate_factor(place, total_steps, settings)
            train_step(state, batch, factor, settings, setup.precision, summed_loss)
            state.step += 1
            seen += size
    split = setup.corpus.splits["validation"]
    with state.averaged_model() as model:
        loss = evaluate(model, setup.corpus.windows("validation", config), split.facts, settings.batch_size).loss
    return state.step, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--batches", nargs="+", default=PLANS, help="batch sizes in order, such as 16-32-64")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    table = Table("batches", "seed", "steps", "validation loss")
    for seed in options.seeds:
        dataset = [f"dataset.name={Path(options.dataset).absolute()}", "dataset.subset=wikitext-2-v1"]
        setup = set_up(load_config("small-fast", [*dataset, f"training.seed={seed}"]))
        for plan in options.batches:
            steps, loss = trained(setup, list(map(int, plan.split("-"))))
            print(f"{plan}, seed {seed}: {loss:.4f} after {steps:,} steps", file=sys.stderr)
            table.add_row(plan, str(seed), f"{steps:,}", f"{loss:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
