"""Compare a training step with other implementations and with the machine's limit: `python benchmarks/training.py`.

The model is that of the original model card: 4 blocks, width 128, 4 heads, context 64, vocabulary 4,096, batches of
32. Each contender runs in its own process and they take turns in rounds, so that load affects all of them; idle ones
wait. Times are medians over rounds.

    pip install -e '.[benchmark]'
    python benchmarks/training.py                # contenders without a compiler, the floor, evaluation, data
    python benchmarks/training.py --compile      # also those with a compiler
    python benchmarks/training.py --steps 5000   # drift of step time and memory of Lumiere's step
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

BATCH, CONTEXT, VOCAB, WIDTH, HIDDEN, LAYERS, HEADS, HEAD_WIDTH = 32, 64, 4096, 128, 256, 4, 4, 32
TOKENS = BATCH * CONTEXT
WARM_UP_STEPS = 5
STEPS_A_TURN = 5
PAUSE = 0.3  # seconds between turns, in which the previous contender's threads fall asleep

HF, PLAIN, OURS = "Hugging Face Llama", "plain PyTorch", "Lumiere"
# Name: (who, type, dropout, compiled).
EAGER = {
    "hf-float32": (HF, "float32", 0.0, False),
    "hf-bfloat16": (HF, "bfloat16", 0.0, False),
    "plain-float32": (PLAIN, "float32", 0.1, False),
    "plain-bfloat16": (PLAIN, "bfloat16", 0.1, False),
    "ours-float32": (OURS, "float32", 0.1, False),
    "ours-bfloat16": (OURS, "bfloat16", 0.1, False),
    "ours-float32-no-dropout": (OURS, "float32", 0.0, False),
    "ours-bfloat16-no-dropout": (OURS, "bfloat16", 0.0, False),
}
COMPILED = {f"{name}-compiled": (who, precision, dropout, True) for name, (who, precision, dropout, _) in EAGER.items()}
EVALUATION = {"evaluation-float32": "float32"}
FLOORS = {"floor-float32": "float32", "floor-bfloat16": "bfloat16"}
EVALUATION_FLOOR = "floor-evaluation"
# Per forward pass: matrices, rows, input columns, output columns, count.
PRODUCTS = [
    (1, TOKENS, WIDTH, 3 * WIDTH, LAYERS),
    (1, TOKENS, WIDTH, WIDTH, LAYERS),
    (1, TOKENS, WIDTH, 2 * HIDDEN, LAYERS),
    (1, TOKENS, HIDDEN, WIDTH, LAYERS),
    (1, TOKENS, WIDTH, VOCAB, 1),
    (BATCH * HEADS, CONTEXT, HEAD_WIDTH, CONTEXT, LAYERS),  # scores
    (BATCH * HEADS, CONTEXT, CONTEXT, HEAD_WIDTH, LAYERS),  # weighted values
]
FORWARD_FLOPS = sum(2 * matrices * rows * read * written * times for matrices, rows, read, written, times in PRODUCTS)

Step = Callable[[], object]


# --- the contenders, each in its own process --------------------------------------------------------------------------


def make_step(name: str) -> Step:
    if name in FLOORS:
        return floor(FLOORS[name])
    if name == EVALUATION_FLOOR:
        return floor(EVALUATION["evaluation-float32"], backward=False)
    if name in EVALUATION:
        return our_evaluation()
    who, precision, dropout, is_compiled = (EAGER | COMPILED)[name]
    make = {HF: hugging_face_step, PLAIN: plain_step, OURS: our_step}[who]
    return make(precision, dropout, is_compiled)


def random_tokens():
    import torch

    tokens = torch.randint(3, VOCAB, (BATCH, CONTEXT + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def optimizing_step(model, loss, precision: str) -> Step:
    """A step as a careful torch user writes it: autocast, clipping, fused AdamW."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hugging_face_step(precision: str, dropout: float, is_compiled: bool) -> Step:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "head_dim": HEAD_WIDTH}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": CONTEXT}
    options: dict[str, Any] = sizes | heads | {"tie_word_embeddings": True, "use_cache": False}
    config = LlamaConfig(vocab_size=VOCAB, **options)
    model = LlamaForCausalLM(config).train()
    forward = torch.compile(model) if is_compiled else model
    tokens, _ = random_tokens()
    return optimizing_step(model, lambda: forward(input_ids=tokens, labels=tokens).loss, precision)


def plain_step(precision: str, dropout: float, is_compiled: bool) -> Step:
    """The model in plain PyTorch: SDPA, `F.cross_entropy`, `nn.Dropout`, `F.rms_norm`."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
            self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
            self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
            self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
            self.dropout = nn.Dropout(dropout)

        def forward(self, resid):
            x = self.norms[0](resid)
            parts = (self.query, self.key, self.value)
            heads = (part(x).unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2) for part in parts)
            z = F.scaled_dot_product_attention(*heads, is_causal=True)
            resid = resid + self.dropout(self.output(z.transpose(1, 2).flatten(-2)))
            x = self.norms[1](resid)
            return resid + self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.dropout = nn.Dropout(dropout)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

        def forward(self, tokens, targets):
            resid = self.dropout(self.tokens(tokens) + self.positions(torch.arange(CONTEXT)))
            for block in self.blocks:
                resid = block(resid)
            logits = F.linear(self.norm(resid), self.tokens.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    model = Model().train()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    forward = torch.compile(model) if is_compiled else model
    tokens, targets = random_tokens()
    return optimizing_step(model, lambda: forward(tokens, targets), precision)


def our_state(dropout: float, precision: str, is_compiled: bool):
    import torch

    from lumiere.config.loader import load_config
    from lumiere.training.state import TrainingState

    overrides = [f"model.dropout={dropout}", f"training.compile={str(is_compiled).lower()}"]
    config = load_config("small", overrides)
    return config, TrainingState.create(config, torch.device("cpu"), getattr(torch, precision))


def our_step(precision: str, dropout: float, is_compiled: bool) -> Step:
    import torch

    from lumiere.data.batches import Batch
    from lumiere.device import keep_freed_memory
    from lumiere.training.loss import compiled, summed_loss
    from lumiere.training.trainer import train_step

    keep_freed_memory()
    config, state = our_state(dropout, precision, is_compiled)
    state.model.train()
    objective = compiled(print_to_stderr) if is_compiled else summed_loss
    batch = Batch(*random_tokens(), TOKENS)
    dtype = getattr(torch, precision)
    return lambda: train_step(state, batch, 1.0, config.training, dtype, objective)


def print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def our_evaluation() -> Step:
    from lumiere.data.dataset import SplitFacts
    from lumiere.device import keep_freed_memory
    from lumiere.evaluation.loss import evaluate

    keep_freed_memory()
    config, state = our_state(0.0, "float32", False)
    windows = random_windows(num_windows=BATCH * STEPS_A_TURN)
    facts = SplitFacts(num_documents=1, num_tokens=2, num_bytes=1, num_words=1, sha256="", num_normalized_bytes=1)
    return lambda: evaluate(state.model, windows, facts, config.training.batch_size)


def random_windows(num_windows: int):
    """Return full windows of random words, with the overlap of the original model card."""
    import numpy as np

    from lumiere.data.batches import Windows

    ids = np.random.default_rng(0).integers(3, VOCAB, num_windows * (CONTEXT - 7) + 8).astype(np.uint16)
    return Windows(ids, np.array([0, len(ids)]), CONTEXT, 8)


def floor(precision: str, backward: bool = True) -> Step:
    """Compute only the matrix products of a step, or of its forward pass, into allocated memory."""
    import torch

    dtype = getattr(torch, precision)
    work = []
    for matrices, rows, read, written, times in PRODUCTS:
        shapes = ((rows, read), (written, read), (rows, written))
        x, weight, gradient = (torch.randn(matrices, *shape).squeeze(0).to(dtype) for shape in shapes)
        forward, by_x, by_weight = torch.empty_like(gradient), torch.empty_like(x), torch.empty_like(weight)
        work += [(x, weight.mT, forward)] * times
        if backward:
            work += [(gradient, weight, by_x), (gradient.mT, x, by_weight)] * times

    def step() -> None:
        for left, right, out in work:
            torch.matmul(left, right, out=out)

    return step


def serve(name: str) -> None:
    """Answer each line of stdin on stdout with the median seconds per step of one turn."""
    step = make_step(name)
    turns = 1 if name in EVALUATION else STEPS_A_TURN  # an evaluation covers the batches of one turn
    for _ in range(WARM_UP_STEPS):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(turns):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds) / (STEPS_A_TURN / turns), flush=True)


# --- the parent -------------------------------------------------------------------------------------------------------


class Contender:
    """A process that runs a turn on request."""

    def __init__(self, name: str) -> None:
        self.seconds: list[float] = []
        command = [sys.executable, __file__, "--serve", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._answer() != "ready":
            raise SystemExit(f"{name} did not start")

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def turn(self) -> None:
        assert self._process.stdin
        print("go", file=self._process.stdin, flush=True)
        self.seconds.append(float(self._answer()))

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Return half the interquartile range as a fraction of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def ratio(first: Contender, second: Contender) -> float:
    """Return the speed of the first relative to the second: the median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(first.seconds, second.seconds, strict=True))


def compare(rounds: int, with_compiler: bool) -> dict:
    names = [*EAGER, *(COMPILED if with_compiler else {}), *EVALUATION, *FLOORS, EVALUATION_FLOOR]
    contenders = {}
    for name in names:
        print(f"starting {name}", file=sys.stderr)
        contenders[name] = Contender(name)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for contender in contenders.values():
            time.sleep(PAUSE)
            contender.turn()
    for contender in contenders.values():
        contender.end()
    return contenders


def show(contenders: dict[str, Contender]) -> dict:
    trainers = {name: facts for name, facts in (EAGER | COMPILED).items() if name in contenders}
    floors = {precision: contenders[name] for name, precision in FLOORS.items()}
    fastest_floor = min(floors.values(), key=lambda contender: contender.median)
    table = Table(title=f"a step of {TOKENS:,} tokens; {os.cpu_count()} CPUs")
    for heading in ("", "type", "dropout", "compiled", "ms", "spread", "tokens/s", "of the type's floor"):
        table.add_column(heading, justify="left" if heading in ("", "type") else "right")
    figures: dict = {}
    for name, (who, precision, dropout, is_compiled) in trainers.items():
        contender = contenders[name]
        share = ratio(contender, floors[precision])
        figures[name] = {"ms": 1e3 * contender.median, "spread": contender.spread, "floor": share}
        speed = f"{TOKENS / contender.median:,.0f}"
        numbers = (f"{1e3 * contender.median:.1f}", f"{contender.spread:.0%}", speed, f"{share:.0%}")
        table.add_row(who, precision, f"{dropout}", "yes" if is_compiled else "no", *numbers)
    for precision, contender in floors.items():
        flops = 3 * FORWARD_FLOPS / contender.median / 1e9
        figures[f"floor-{precision}"] = {"ms": 1e3 * contender.median, "gflops": flops}
        numbers = (f"{1e3 * contender.median:.1f}", f"{contender.spread:.0%}", f"{flops:.0f} GFLOP/s", "100%")
        table.add_row("matrix products alone", precision, "", "", *numbers)
    console = Console(width=110)
    console.print(table)

    def best(who: str, dropouts: set[float], compilers: set[bool]) -> str:
        names = [name for name, (w, _, d, c) in trainers.items() if w == who and d in dropouts and c in compilers]
        return min(names, key=lambda name: contenders[name].median)

    def line(text: str, mine: str, other: str, target: float) -> None:
        value = ratio(contenders[mine], contenders[other])
        figures[text] = value
        console.print(f"{text}: {value:.2f} times ({mine} / {other}; target {target})")

    hugging_face = best(HF, {0.0}, {False})
    line("eager, no dropout, beside Hugging Face", best(OURS, {0.0}, {False}), hugging_face, 2.5)
    line("eager, dropout 0.1, beside Hugging Face (without)", best(OURS, {0.1}, {False}), hugging_face, 2.2)
    if any(is_compiled for *_, is_compiled in trainers.values()):
        mine = best(OURS, {0.1}, {True})
        line("compiled, dropout 0.1, beside Hugging Face (without)", mine, best(HF, {0.0}, {False, True}), 1.8)
        line("compiled, dropout 0.1, beside plain PyTorch", mine, best(PLAIN, {0.1}, {False, True}), 1.8)
    mine = best(OURS, {0.0, 0.1}, {False, True})
    own_floor = ratio(contenders[mine], floors[trainers[mine][1]])
    best_floor = ratio(contenders[mine], fastest_floor)
    console.print(
        f"best mode, {mine}: {own_floor:.0%} of its floor, {best_floor:.0%} of the faster type's (target 60%)"
    )
    evaluation = ratio(contenders["evaluation-float32"], contenders[EVALUATION_FLOOR])
    milliseconds = f"{1e3 * contenders['evaluation-float32'].median:.1f} ms a batch"
    console.print(f"evaluation: {milliseconds}, {evaluation:.0%} of the floor of its forward passes (target 75%)")
    data = data_seconds()
    step = contenders[mine].median
    console.print(f"batch_at: {1e3 * data:.2f} ms, {data / step:.2%} of that step (target under 1%)")
    return figures | {"best_of_floor": own_floor, "evaluation_of_floor": evaluation, "data_share": data / step}


def data_seconds() -> float:
    """Return the seconds to assemble one batch from a corpus as long as WikiText-2, a median of many steps."""
    from lumiere.data.batches import batch_at

    windows = random_windows(53_670)
    seconds = []
    for step in range(300):
        start = time.perf_counter()
        batch_at(step, windows, BATCH, seed=0)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def drift(num_steps: int, precision: str) -> dict:
    """Print step time and resident memory over many steps."""
    step = our_step(precision, 0.1, False)
    seconds, memory = [], []
    for number in range(num_steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        if number % (num_steps // 10) == num_steps // 10 - 1:
            with open("/proc/self/statm", encoding="ascii") as statm:
                memory.append(int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20)
            median = statistics.median(seconds[-num_steps // 10 :])
            print(f"step {number + 1:,}: {1e3 * median:.1f} ms, {memory[-1]:,.0f} MB resident", flush=True)
    tenth = num_steps // 10
    first, last = statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])
    print(f"last tenth beside the first: {last / first - 1:+.1%} a step, {memory[-1] - memory[0]:+.1f} MB")
    return {"drift": last / first - 1, "growth_mb": memory[-1] - memory[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also contenders with torch.compile")
    parser.add_argument("--steps", type=int, help="run only our own step this many times, to measure drift")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of --steps")
    parser.add_argument("--json", action="store_true", help="print the results as JSON at the end")
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    else:
        if arguments.steps:
            figures = drift(arguments.steps, arguments.precision)
        else:
            figures = show(compare(arguments.rounds, arguments.compile))
        if arguments.json:
            print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
