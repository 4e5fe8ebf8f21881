# ruff: noqa: E402 (thread waiting must be configured before torch is imported)
"""Compare the speed of text generation with other implementations: `python benchmarks/generation.py`.

The model is that of the original model card: 4 blocks, width 128, 4 heads, context 64, vocabulary 4,096, random
weights, float32. Each contender generates 60 tokens after prompts of 4, at temperature 1, top-k 50 and top-p 0.95,
without an end token. Contenders take turns in rounds, so that load affects all of them; times are medians over
rounds, ratios medians of the rounds' ratios. Peers use one thread or all, whichever is faster.

    pip install -e '.[benchmark]'
    python benchmarks/generation.py             # one stream and 64 prompts
    python benchmarks/generation.py --compile   # also with torch.compile
    python benchmarks/generation.py --cpu-time  # one thread each, CPU time: for a busy machine
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from random import Random
from typing import Any

from lumiere.cli import sleep_while_waiting

sleep_while_waiting()  # as the command does, before torch
import torch
from rich.console import Console
from rich.table import Table

from lumiere.config.loader import load_config
from lumiere.data.tokenizer import EOT, PAD, SOT
from lumiere.generation.decoding import Limits, generate_pieces
from lumiere.generation.kv_cache import CachedDecoder, compiled_step
from lumiere.generation.sampling import Sampling
from lumiere.models.transformer import Transformer, build_model

PROMPT, NEW_TOKENS, LONG = 4, 60, 600
TOP_K, TOP_P = 50, 0.95
SAMPLING = Sampling(top_k=TOP_K, top_p=TOP_P)
FLOOR_ROWS, FLOOR_READ, FLOOR_WRITTEN = 2048, 128, 4096  # the unembedding of a training batch

Write = Callable[[int], None]


class Text:
    """Stand-in for a tokenizer: every token is a letter."""

    def token_bytes(self, token: int) -> bytes:
        return b"a"


def prompts(num_rows: int) -> list[list[int]]:
    random = Random(0)
    return [[SOT, *(random.randrange(3, 4096) for _ in range(PROMPT - 1))] for _ in range(num_rows)]


def ours(model: Transformer, sampling: Sampling, is_compiled: bool, num_tokens: int = NEW_TOKENS) -> Write:
    # One per number of rows, because a decoder rebuilds its cache when that changes.
    decoders = {
        n: CachedDecoder(model, [SOT, EOT, PAD], compiled_step(print) if is_compiled else None) for n in (1, 64)
    }

    def write(num_rows: int) -> None:
        randoms = [Random(i) for i in range(num_rows)]
        limits = Limits(num_tokens)
        for _ in generate_pieces(
            decoders[num_rows],
            Text(),  # pyright: ignore[reportArgumentType]
            prompts(num_rows),
            sampling,
            randoms,
            limits,
        ):
            pass

    return write


def plain_loop(model: Transformer) -> Write:
    """Generate in the obvious way: a full forward pass per token and `torch.multinomial`."""

    @torch.inference_mode()
    def write(num_rows: int) -> None:
        tokens_BT = torch.tensor(prompts(num_rows))
        for _ in range(NEW_TOKENS):
            logits_BV = model.logits(tokens_BT[:, -64:])[:, -1]
            smallest_B1 = logits_BV.topk(TOP_K).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
            ascending_BV, order_BV = logits_BV.sort()
            goes_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - TOP_P
            logits_BV = logits_BV.masked_fill(goes_BV.scatter(1, order_BV, goes_BV), -torch.inf)
            tokens_BT = torch.cat([tokens_BT, torch.multinomial(logits_BV.softmax(-1), 1)], dim=1)

    return write


def hugging_face() -> Write:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    ids = {"bos_token_id": SOT, "eos_token_id": None, "pad_token_id": PAD}
    model: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=4096, **sizes, **heads, **ids, tie_word_embeddings=True)
    ).eval()

    @torch.inference_mode()
    def write(num_rows: int) -> None:
        tokens_BT = torch.tensor(prompts(num_rows))
        controls = {"do_sample": True, "top_k": TOP_K, "top_p": TOP_P, "use_cache": True}
        mask_BT = torch.ones_like(tokens_BT)
        written = model.generate(tokens_BT, attention_mask=mask_BT, max_new_tokens=NEW_TOKENS, **controls)
        assert written.shape == (num_rows, PROMPT + NEW_TOKENS)

    return write


def floor_flops() -> float:
    """Return the FLOP/s of one matrix product of the training floor, best of a few."""
    left, right = torch.randn(FLOOR_ROWS, FLOOR_READ), torch.randn(FLOOR_READ, FLOOR_WRITTEN)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * FLOOR_ROWS * FLOOR_READ * FLOOR_WRITTEN / min(seconds)


def contenders(with_compiled: bool, all_threads: int) -> dict[str, tuple[Write, int, int, list[int]]]:
    """Return the contenders by name: generator, tokens per row, threads (0: its own choice), numbers of rows."""
    torch.manual_seed(0)
    model = build_model(load_config("small")).eval()
    theirs, loop = hugging_face(), plain_loop(model)
    found: dict[str, tuple[Write, int, int, list[int]]] = {}
    for threads in sorted({1, all_threads}):
        found[f"transformers, {threads} threads"] = (theirs, NEW_TOKENS, threads, [1, 64])
        found[f"cache-less loop, {threads} threads"] = (loop, NEW_TOKENS, threads, [1])
    found["Lumiere"] = (ours(model, SAMPLING, False), NEW_TOKENS, all_threads, [1, 64])
    found["Lumiere, greedy"] = (ours(model, Sampling(0), False), NEW_TOKENS, all_threads, [1, 64])
    found[f"Lumiere, {LONG} tokens"] = (ours(model, SAMPLING, False, LONG), LONG, all_threads, [1])
    if with_compiled:
        found["Lumiere, compiled"] = (ours(model, SAMPLING, True), NEW_TOKENS, all_threads, [1, 64])
    return found


def measure(rounds: int, with_compiled: bool, in_cpu_time: bool) -> dict[int, dict[str, list[float]]]:
    """Return tokens per second in each round, by number of rows and contender."""
    clock = time.process_time if in_cpu_time else time.perf_counter
    entrants = contenders(with_compiled, 1 if in_cpu_time else torch.get_num_threads())
    speeds: dict[int, dict[str, list[float]]] = {1: {}, 64: {}}
    for number in range(-1, rounds):
        for name, (write, num_tokens, threads, numbers) in entrants.items():
            torch.set_num_threads(threads)
            for num_rows in numbers:
                start = clock()
                write(num_rows)
                speed = num_rows * num_tokens / (clock() - start)
                if number >= 0:  # the first round is warm-up
                    speeds[num_rows].setdefault(name, []).append(speed)
    return speeds


def show(speeds: dict[int, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    console = Console()
    figures: dict[str, dict[str, float]] = {}
    for num_rows, by_name in speeds.items():
        peers = [name for name in by_name if "transformers" in name]
        best = max(peers, key=lambda name: statistics.median(by_name[name]))
        loops = [name for name in by_name if "loop" in name]
        loop = max(loops, key=lambda name: statistics.median(by_name[name]), default=None)
        table = Table(f"{num_rows} at once", "tokens/s", "spread", "of transformers", "of the loop")
        for name, values in by_name.items():
            to_best = statistics.median(a / b for a, b in zip(values, by_name[best], strict=True))
            to_loop = statistics.median(a / b for a, b in zip(values, by_name[loop], strict=True)) if loop else None
            quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
            median = statistics.median(values)
            spread = f"{(quartiles[2] - quartiles[0]) / 2 / median:.0%}"
            table.add_row(name, f"{median:,.0f}", spread, f"{to_best:.2f}", "" if to_loop is None else f"{to_loop:.2f}")
            figures[f"{name}, {num_rows} at once"] = {"tokens_per_second": median, "of_transformers": to_best}
        console.print(table)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--cpu-time", action="store_true", help="one thread each, measured in CPU time")
    parser.add_argument("--json", action="store_true", help="print the results as JSON at the end")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    flops = floor_flops()
    figures = show(measure(arguments.rounds, arguments.compile, arguments.cpu_time))
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"one product of the floor: {flops / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads; load {busy:.1f}")
    if arguments.json:
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
