"""Measure how often `lumiere inspect dynamics` claims a phase change, falsely or correctly.

    python benchmarks/phases.py --curves 1000

Each row is a family of curves, sampled at the snapshot steps of training runs of several lengths, with the percentage
for which a phase change is claimed. Smooth curves rise from 0 to 1 with Gaussian noise of the given standard
deviation; a transition is a logistic curve over steps whose width is a fraction of its center's step.

Shapes: C curve, N snapshot.
"""

import argparse
from collections.abc import Mapping

import numpy as np

from lumiere.interpret.dynamics import find_phase_change
from lumiere.training.schedule import is_snapshot

LAST_STEPS = (2048, 2560, 4096, 8192, 32768)
NOTICEABLE = 0.1
NOISES = (0.0, 0.003, 0.01, 0.03)
BIRTH_WIDTHS = (0.05, 0.1, 0.15)


def snapshot_steps(last: int) -> np.ndarray:
    """Return (N,) the snapshot steps of a run of `last` steps."""
    return np.array([step for step in range(last + 1) if is_snapshot(step, last)])


def smooth_curves(steps: np.ndarray, num_curves: int, seed: int) -> Mapping[str, np.ndarray]:
    """Return (C, N) curves by name that have no phase change: smooth growth, and noise around a constant."""
    draw, last = np.random.default_rng(seed), steps[-1]
    time_constants = np.exp(draw.uniform(np.log(2), np.log(last), (num_curves, 1)))
    shapes = {
        "straight line": steps / last,
        "1 - exp(-step/600)": 1 - np.exp(-steps / 600),
        "1 - exp(-step/any)": 1 - np.exp(-steps / time_constants),
        "square root": np.sqrt(steps / last),
        "any power below 1": (steps / last) ** draw.uniform(0.2, 1, (num_curves, 1)),
        "logarithm": np.log2(1 + steps) / np.log2(1 + last),
    }
    curves = {
        f"{name}, noise {noise:g}": shape + draw.normal(0, noise, (num_curves, len(steps)))
        for name, shape in shapes.items()
        for noise in NOISES
    }
    return curves | {"white noise": draw.normal(0, 10, (num_curves, len(steps)))}


def random_walks(steps: np.ndarray, num_curves: int, seed: int) -> Mapping[str, np.ndarray]:
    """Return (C, N) sums of independent increments by name: one per snapshot, or one per step."""
    increments = np.random.default_rng(seed).normal(0, 1, (num_curves, len(steps)))
    by_step = increments * np.sqrt(np.diff(steps, prepend=0))
    return {"random walk over snapshots": increments.cumsum(1), "random walk over steps": by_step.cumsum(1)}


def births(steps: np.ndarray, num_curves: int, seed: int) -> Mapping[str, np.ndarray]:
    """Return (C, N) rises from 0 to 0.8 by name, noise 0.02, centered between step 24 and the third-last snapshot."""
    draw = np.random.default_rng(seed)
    centers = np.exp(draw.uniform(np.log(24), np.log(steps[-3]), (num_curves, 1)))
    return {
        f"birth, width {width:.0%}": 0.8 / (1 + np.exp(-(steps - centers) / (width * centers)))
        + draw.normal(0, 0.02, (num_curves, len(steps)))
        for width in BIRTH_WIDTHS
    }


def share_claimed(steps: np.ndarray, curves: np.ndarray) -> float:
    """Return the fraction of curves for which a phase change is claimed."""
    return float(np.mean([find_phase_change(steps, curve, NOTICEABLE) is not None for curve in curves]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=int, default=1000, help="curves per family and length")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{'last step':32}" + "".join(f"{last:>8,}" for last in LAST_STEPS))
    schedules = [snapshot_steps(last) for last in LAST_STEPS]
    for family in (smooth_curves, random_walks, births):
        tables = [family(steps, options.curves, options.seed) for steps in schedules]
        for name in tables[0]:
            shares = [share_claimed(steps, curves[name]) for steps, curves in zip(schedules, tables, strict=True)]
            print(f"{name:32}" + "".join(f"{share:>8.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
