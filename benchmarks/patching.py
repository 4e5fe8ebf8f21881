"""Compare the time of activation patching with TransformerLens: `python benchmarks/patching.py`.

On the model of the original model card (4 blocks, width 128, 64 positions, vocabulary 4,096) with random weights, as
`lumiere export` writes it for TransformerLens: the stream before each block at each of 64 positions, 256 cells, by
`lumiere.interpret.patching.patch`, receipts included, and by `get_act_patch_resid_pre` of TransformerLens. The prompts
differ from position 1 on, so that no cell is known beforehand. Both sweeps take turns; times are medians in seconds,
with all threads, and the maps are compared.

    pip install -e '.[test,transformer-lens]'
    python benchmarks/patching.py
"""

import argparse
import contextlib
import io
import logging
import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lumiere.config.loader import load_config
from lumiere.data.tokenizer import Tokenizer
from lumiere.device import keep_freed_memory
from lumiere.export.exporting import TARGETS, export_model
from lumiere.export.original import Original
from lumiere.interpret.patching import patch
from lumiere.interpret.prompts import PromptPairs, pair_up
from lumiere.models.transformer import Transformer, build_model

POSITIONS = 64


def twin(model: Transformer) -> Any:
    """Return the same model in TransformerLens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exported"
        export_model(TARGETS["transformer-lens"], path, Original(model, Tokenizer.train(["any text"], 259, 2), {}))
        return runpy.run_path(str(path / "load.py"))["load_model"](torch.float32)


def their_sweep(theirs: Any, pairs: PromptPairs) -> torch.Tensor:
    """Return the metric with each cell patched, (L, T), by TransformerLens."""
    from transformer_lens import patching  # pyright: ignore[reportMissingImports]

    assert pairs.targets is not None
    assert pairs.versus is not None
    target, versus = int(pairs.targets), int(pairs.versus)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, target] - logits[0, -1, versus]

    with torch.no_grad():
        _, cache = theirs.run_with_cache(pairs.clean)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            return patching.get_act_patch_resid_pre(theirs, pairs.corrupt, cache, metric)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    logging.disable(logging.WARNING)
    keep_freed_memory()
    torch.manual_seed(0)
    model = build_model(load_config("small")).eval()
    for parameter in model.parameters():  # so large that heads attend somewhere
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.1)
    clean = torch.randint(3, model.vocab_size, (POSITIONS,)).tolist()
    corrupt = [clean[0], *torch.randint(3, model.vocab_size, (POSITIONS - 1,)).tolist()]
    pairs = pair_up([clean], [corrupt], [5], [6])
    theirs = twin(model)
    times: dict[str, list[float]] = {"lumiere": [], "TransformerLens": []}
    maps = {}
    for round_number in range(rounds + 1):
        for name, sweep in {
            "lumiere": lambda: torch.from_numpy(patch(model, pairs, "resid_pre", "position").patched[:, 0, :, 0]),
            "TransformerLens": lambda: their_sweep(theirs, pairs),
        }.items():
            start = time.perf_counter()
            maps[name] = sweep()
            if round_number:  # the first warms up
                times[name].append(time.perf_counter() - start)
    difference = float((maps["lumiere"] - maps["TransformerLens"]).abs().max())
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    for name, found in times.items():
        print(f"{name:16} {statistics.median(found):.3f} s for {model.num_layers} x {POSITIONS} cells")
    print(f"ratio {statistics.median(ratios):.1f} (of {min(ratios):.1f} to {max(ratios):.1f}); largest difference")
    print(f"of the metric {difference:.0e}, {torch.get_num_threads()} threads, {rounds} rounds")


if __name__ == "__main__":
    main()
