"""Compare a training step with `LlamaForCausalLM` over sizes: `python benchmarks/grid.py`.

Grid: width 128 and 384, context 64, 256, 500 and 1,024, vocabulary 4,096, 32,000 and 50,304, float32 and bfloat16; 4
blocks, heads of width 32, batches of 2,048 tokens, AdamW, no dropout. The peer is used as its documentation shows,
with clipping and fused AdamW. Each cell runs in its own process, in which both models alternate. The ratio is the
median of the rounds' ratios; above 1, Lumiere is faster.

    pip install -e '.[benchmark]'
    python benchmarks/grid.py                                          # all 48 cells, some hours
    python benchmarks/grid.py --widths 128 --contexts 64 --vocabs 4096 # the shape of the original model card
    python benchmarks/grid.py --threads 1 --rounds 5
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

WIDTHS, CONTEXTS, VOCABS, PRECISIONS = (128, 384), (64, 256, 500, 1024), (4096, 32_000, 50_304), ("float32", "bfloat16")
TOKENS = 2048
LAYERS, HEAD_WIDTH = 4, 32


def our_step(width: int, context: int, vocab: int, precision: str) -> Callable[[], object]:
    import torch

    from lumiere.config.loader import load_config
    from lumiere.data.batches import Batch
    from lumiere.training.loss import summed_loss
    from lumiere.training.state import TrainingState
    from lumiere.training.trainer import train_step

    sizes = {
        "embedding_size": width,
        "context_size": context,
        "num_layers": LAYERS,
        "num_heads": width // HEAD_WIDTH,
        "d_key": HEAD_WIDTH,
        "d_value": HEAD_WIDTH,
        "d_ff": 2 * width,
        "dropout": 0.0,
        "positions": "rotary",
    }
    overrides = [f"model.{name}={value}" for name, value in sizes.items()]
    config = load_config("small", [*overrides, f"tokenizer.vocab_size={vocab}"])
    dtype = getattr(torch, precision)
    state = TrainingState.create(config, torch.device("cpu"), dtype)
    state.model.train()
    tokens = torch.randint(3, vocab, (TOKENS // context, context + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), TOKENS // context * context)
    return lambda: train_step(state, batch, 1.0, config.training, dtype, summed_loss)


def peer_step(width: int, context: int, vocab: int, precision: str) -> Callable[[], object]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = width // HEAD_WIDTH
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    tokens = torch.randint(3, vocab, (TOKENS // context, context))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(cell: tuple[int, int, int, str], rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds per step in each round, of Lumiere and the peer."""
    from lumiere.device import keep_freed_memory

    keep_freed_memory()  # for both, since they share the process
    contenders = [our_step(*cell), peer_step(*cell)]
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for step, times in zip(contenders, seconds, strict=True):
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if number:  # the first round is warm-up
                times.append((time.perf_counter() - start) / steps)
    return seconds[0], seconds[1]


def measured(cell: tuple[int, int, int, str], rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Run `measure` in a separate process."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell), "--rounds", str(rounds), "--steps", str(steps)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--vocabs", nargs="+", type=int, default=VOCABS)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each contender per round")
    parser.add_argument("--threads", type=int, help="torch threads (default: its own choice)")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(json.loads(options.cell), options.rounds, options.steps)))
        return
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    table = Table(title=f"a step of {TOKENS:,} tokens; {options.threads or os.cpu_count()} threads")
    for heading in ("width", "context", "vocabulary", "type", "Lumiere, ms", "Llama, ms", "ratio", "quartiles"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for cell in itertools.product(options.widths, options.contexts, options.vocabs, options.precisions):
        ours, peers = measured(cell, options.rounds, options.steps)
        ratios = [theirs / mine for mine, theirs in zip(ours, peers, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        times = (f"{1e3 * statistics.median(seconds):,.0f}" for seconds in (ours, peers))
        width, context, vocab, precision = cell
        table.add_row(
            f"{width}", f"{context:,}", f"{vocab:,}", precision, *times, f"{middle:.2f}", f"{low:.2f} - {high:.2f}"
        )
        print(f"{cell}: {middle:.2f}", file=sys.stderr)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
