"""Compare training steps of other blocks with the same blocks in plain PyTorch: `python benchmarks/blocks.py`.

Kinds of blocks: those of Llama, Qwen3, GPT-2, GPT-NeoX, GPT-Neo (windows), attention-only models, and models without
norms; 4 blocks of width 128, 4 heads, context 64, vocabulary 4,096, batches of 2,048 tokens, no dropout. The plain form
is `nn.Linear`, `nn.LayerNorm` or `nn.RMSNorm`, `F.scaled_dot_product_attention`, `F.cross_entropy`, clipping and fused
AdamW. First both must give the same loss with the same weights.

"step" is a whole training step, "blocks" the forward and backward pass of the blocks alone. Both models alternate in
one process, one per kind. Above 1, Lumiere is faster; the ratio is the median of the rounds' ratios. One thread is
measured in CPU time, which other processes disturb less; more threads in elapsed time.

    python benchmarks/blocks.py
    python benchmarks/blocks.py --threads 2 --kinds llama gpt2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

BATCH, CONTEXT, VOCAB, LAYERS, HEADS, HEAD_WIDTH = 32, 64, 4096, 4, 4, 32
SIZES: dict[str, Any] = {
    "embedding_size": 128, "context_size": CONTEXT, "num_layers": LAYERS, "num_heads": HEADS, "d_key": HEAD_WIDTH,
    "d_value": HEAD_WIDTH, "d_ff": 256, "dropout": 0.0,
}  # fmt: skip
LLAMA = {"positions": "rotary", "num_key_value_heads": 2, "tie_embeddings": False}
GPT2 = {"norm": "layer", "bias": "all", "feedforward": "gelu_tanh", "d_ff": 512}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": LLAMA | {"query_key_norm": True},
    "gpt2": GPT2,
    "gpt-neox": GPT2 | {
        "feedforward": "gelu", "positions": "rotary", "rotary_fraction": 0.25, "parallel_blocks": True,
        "tie_embeddings": False,
    },
    "gpt-neo": GPT2 | {"attention_windows": [None, 16, None, 16], "attention_scale": 1.0},
    "attention-only": {"norm": "layer", "bias": "all", "feedforward": "none", "tie_embeddings": False},
    "no-norms": {"norm": "none", "feedforward": "relu", "d_ff": 512, "tie_embeddings": False},
}  # fmt: skip
PRECISIONS = ("float32", "bfloat16")

Step = Callable[[], object]


def plain_model(settings: Any) -> Any:
    """The model in plain PyTorch, with the names of Lumiere's parameters."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    width, has_bias, size = settings.embedding_size, settings.bias == "all", settings.rotary_size
    activations = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
    groups = settings.key_value_heads
    positions = torch.arange(CONTEXT)
    periods = settings.rotary_base ** (torch.arange(0, size, 2) / max(size, 1))
    angles = torch.cat([positions[:, None] / periods] * 2, dim=-1)
    cos, sin = angles.cos(), angles.sin()

    def make_norm() -> nn.Module:
        if settings.norm == "none":
            return nn.Identity()
        return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[settings.norm](width, eps=settings.norm_epsilon)

    def rotated(x: Any) -> Any:
        turned, rest = x[..., :size], x[..., size:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([turned, rest], dim=-1).to(x.dtype) if rest.shape[-1] else turned.to(x.dtype)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            bias = settings.bias != "none"
            self.query = nn.Linear(width, HEADS * HEAD_WIDTH, bias=bias)
            self.key, self.value = (nn.Linear(width, groups * HEAD_WIDTH, bias=bias) for _ in range(2))
            self.output = nn.Linear(HEADS * HEAD_WIDTH, width, bias=has_bias)
            if settings.query_key_norm:
                self.query_norm, self.key_norm = (nn.RMSNorm(HEAD_WIDTH, settings.norm_epsilon) for _ in range(2))

        def forward(self, x: Any, mask: Any) -> Any:
            q, k, v = (part(x).unflatten(-1, (-1, HEAD_WIDTH)) for part in (self.query, self.key, self.value))
            if settings.query_key_norm:
                q, k = self.query_norm(q.float()).to(v.dtype), self.key_norm(k.float()).to(v.dtype)
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            if size:
                q, k = rotated(q), rotated(k)
            z = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=settings.attention_scale, enable_gqa=groups < HEADS
            )
            return self.output(z.transpose(1, 2).flatten(-2))

    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (
                nn.Linear(*shape, bias=has_bias) for shape in ((width, settings.d_ff), (settings.d_ff, width))
            )
            if settings.is_gated:
                self.gate = nn.Linear(width, settings.d_ff, bias=has_bias)

        def forward(self, x: Any) -> Any:
            if settings.is_gated:
                return self.down(F.silu(self.gate(x)) * self.up(x))
            return self.down(activations[settings.feedforward](self.up(x)))

    class Block(nn.Module):
        def __init__(self, window: int | None) -> None:
            super().__init__()
            self.attention_norm, self.attention, self.mask = make_norm(), Attention(), None
            if window is not None:
                distances = positions[:, None] - positions
                self.mask = (distances >= 0) & (distances < window)
            self.has_feedforward = settings.feedforward != "none"
            if self.has_feedforward:
                self.feedforward_norm, self.feedforward = make_norm(), FeedForward()

        def forward(self, resid: Any) -> Any:
            middle = resid + self.attention(self.attention_norm(resid), self.mask)
            if not self.has_feedforward:
                return middle
            read = resid if settings.parallel_blocks else middle
            return middle + self.feedforward(self.feedforward_norm(read))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token_embedding = nn.Embedding(VOCAB, width)
            self.position_embedding = nn.Embedding(CONTEXT, width) if settings.positions == "learned" else None
            windows = settings.attention_windows or [None] * LAYERS
            self.blocks = nn.ModuleList(Block(window) for window in windows)
            self.final_norm = make_norm()
            self.output_head = None if settings.tie_embeddings else nn.Linear(width, VOCAB, bias=False)

        def run_blocks(self, resid: Any) -> Any:
            for block in self.blocks:
                resid = block(resid)
            return self.final_norm(resid)

        def forward(self, tokens: Any, targets: Any) -> Any:
            resid = self.token_embedding(tokens)
            if self.position_embedding is not None:
                resid = resid + self.position_embedding(positions)
            head = self.output_head or self.token_embedding
            logits = F.linear(self.run_blocks(resid), head.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return Model()


def make_steps(kind: str, precision: str) -> dict[str, tuple[Step, Step]]:
    """Return a step of Lumiere and of the plain form, by what they compute."""
    import torch

    from lumiere.config.loader import changed_config, load_config
    from lumiere.data.batches import Batch
    from lumiere.training.loss import summed_loss
    from lumiere.training.state import TrainingState
    from lumiere.training.trainer import train_step

    torch.manual_seed(0)
    changes = {f"model.{name}": value for name, value in (SIZES | KINDS[kind]).items()}
    config = changed_config(load_config("small").model_dump(), (changes | {"tokenizer.vocab_size": VOCAB}).items())
    dtype = getattr(torch, precision)
    state = TrainingState.create(config, torch.device("cpu"), dtype)
    model, plain = state.model.train(), plain_model(config.model).train()
    plain.load_state_dict(model.state_dict())
    windows = torch.randint(3, VOCAB, (BATCH, CONTEXT + 1))
    tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    with torch.no_grad():
        ours, theirs = summed_loss(model, tokens, targets) / targets.numel(), plain(tokens, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    batch = Batch(tokens, targets, targets.numel())

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)

    def plain_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = plain(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    resid = torch.randn(BATCH, CONTEXT, config.model.embedding_size, requires_grad=True)
    gradient = torch.randn_like(resid)

    def blocks_alone(run: Callable[[Any], Any], owner: Any) -> Step:
        def step() -> None:
            with autocast():
                final = run(resid)
            final.backward(gradient.to(final.dtype))
            resid.grad = None
            owner.zero_grad(set_to_none=True)

        return step

    return {
        "step": (
            lambda: train_step(state, batch, 1.0, config.training, dtype, summed_loss),
            plain_step,
        ),
        "blocks": (
            blocks_alone(lambda resid: model.continue_from(resid, 0), model),
            blocks_alone(plain.run_blocks, plain),
        ),
    }


def measure(cell: tuple[str, str], rounds: int, steps: int) -> dict[str, list[list[float]]]:
    """Return the seconds per step in each round, of Lumiere and of the plain form, by what they compute."""
    import torch

    from lumiere.device import keep_freed_memory

    keep_freed_memory()  # for both, since they share the process
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found = {}
    for name, contenders in make_steps(*cell).items():
        seconds: list[list[float]] = [[], []]
        for number in range(rounds + 1):
            for step, times in zip(contenders, seconds, strict=True):
                start = clock()
                for _ in range(steps):
                    step()
                if number:  # the first round is warm-up
                    times.append((clock() - start) / steps)
        found[name] = seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=1, help="steps of each contender per round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(json.loads(options.one), options.rounds, options.steps)))
        return
    spins = {"GOMP_SPINCOUNT": "10000"}  # as the `lumiere` command
    environment = spins | os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    table = Table(title=f"steps of {BATCH * CONTEXT:,} tokens; threads: {options.threads}")
    for heading in ("blocks of", "type", "", "Lumiere, ms", "plain, ms", "ratio", "quartiles"):
        table.add_column(heading, justify="right" if heading.endswith(("ms", "ratio", "quartiles")) else "left")
    for kind in options.kinds:
        for precision in options.precisions:
            command = [sys.executable, __file__, "--one", json.dumps([kind, precision])]
            command += ["--rounds", str(options.rounds), "--steps", str(options.steps)]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            for name, (ours, plain) in json.loads(result.stdout).items():
                low, middle, high = statistics.quantiles((b / a for a, b in zip(ours, plain, strict=True)), n=4)
                times = (f"{1e3 * statistics.median(seconds):,.1f}" for seconds in (ours, plain))
                table.add_row(kind, precision, name, *times, f"{middle:.2f}", f"{low:.2f} - {high:.2f}")
                print(f"{kind}, {precision}, {name}: {middle:.2f}", file=sys.stderr)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
