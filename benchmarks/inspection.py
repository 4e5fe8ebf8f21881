"""Measure the cost of inspection: `python benchmarks/inspection.py`. (`inspect.py` would shadow the standard library.)

On the model of the original model card (4 blocks, width 128, context 64, vocabulary 4,096), 1 window and 32, one
thread: hook points without functions, against a copy of the model whose code has none; caching all activations,
against a pass without; and the same for TransformerLens on the same weights, as `lumiere export` writes them. Then,
with all threads, the time of each `lumiere inspect` command on a run after loading its model.

`lumiere inspect`, like training, asks the C library to keep freed memory, which spares a pass fresh pages; a plain
script does not. All contenders are measured both ways.

Passes take turns, and times are medians over rounds in CPU time, which excludes waiting on a busy machine. Ratios are
medians of the rounds' ratios.

    pip install -e '.[test,transformer-lens]'
    python benchmarks/inspection.py --run latest
"""

import argparse
import ast
import inspect
import json
import logging
import os
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from lumiere.components.hooks import HookPoint, hook_points, run_with_cache
from lumiere.config.loader import load_config
from lumiere.data.tokenizer import Tokenizer
from lumiere.device import keep_freed_memory
from lumiere.export.exporting import TARGETS, export_model
from lumiere.export.original import Original
from lumiere.models.transformer import Transformer, build_model

WINDOWS = (1, 32)
WARM_UP_ROUNDS = 3
# Arguments other than the defaults; a new analysis needs no entry.
OPTIONS: dict[str, list[str]] = {}
ANALYSIS_REPEATS = 5
FAST, WATCHED, BARE, CACHED = "fast pass", "watching pass", "watching pass without hook points", "all activations kept"
THEIRS, THEIRS_CACHED = "TransformerLens, pass", "TransformerLens, all activations kept"

Pass = Callable[[], object]


def without_hook_points(model: Transformer) -> Transformer:
    """Return a copy of `model` whose classes call no hook points."""
    names = ["lumiere.components.layers", "lumiere.models.transformer"]
    originals = {name: sys.modules[name] for name in names}
    try:
        for name in names:  # each imports the previous ones
            tree = ast.fix_missing_locations(WithoutHooks().visit(ast.parse(inspect.getsource(originals[name]))))
            sys.modules[name] = ModuleType(name)
            exec(compile(tree, name, "exec"), sys.modules[name].__dict__)
        copy = build_with(sys.modules[names[-1]].Transformer, model)
    finally:
        sys.modules.update(originals)
    assert not any(isinstance(module, HookPoint) for module in copy.modules())
    return copy


def build_with(cls: type[Transformer], model: Transformer) -> Transformer:
    sizes = ("vocab_size", "embedding_size", "context_size", "num_layers", "num_heads", "d_key", "d_value", "d_ff")
    copy = cls(**{name: getattr(model, name) for name in sizes}).eval()
    copy.load_state_dict(model.state_dict())
    return copy


class WithoutHooks(ast.NodeTransformer):
    """Replace `self.hook_q(x)` by `x` and remove `self.hook_q = HookPoint()`."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        is_hook = isinstance(node.func, ast.Attribute) and node.func.attr.startswith("hook_")
        self.generic_visit(node)
        return node.args[0] if is_hook else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Read `self.hook_q` as None and `self.hook_q.is_set` as False."""
        if isinstance(node.ctx, ast.Load) and node.attr.startswith("hook_"):
            return ast.Constant(None)
        if node.attr == "is_set":
            return ast.Constant(False)
        self.generic_visit(node)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        self.generic_visit(node)
        target = node.targets[0]
        return None if isinstance(target, ast.Attribute) and target.attr.startswith("hook_") else node


def transformer_lens_twin(model: Transformer) -> Any:
    """Return the same model in TransformerLens, or None if that is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exported"
        tokenizer = Tokenizer.train(["any text"], 259, 2)
        exported = export_model(TARGETS["transformer-lens"], path, Original(model, tokenizer, {}))
        if exported.notes:
            return None
        return runpy.run_path(str(path / "load.py"))["load_model"]()


def passes(model: Transformer, bare: Transformer, bridge: Any, tokens_BT: torch.Tensor) -> dict[str, Pass]:
    found: dict[str, Pass] = {
        FAST: lambda: model.logits(tokens_BT),
        BARE: lambda: bare(tokens_BT),
        WATCHED: lambda: model(tokens_BT),
        CACHED: lambda: run_with_cache(model, tokens_BT),
    }
    if bridge is not None:
        found |= {THEIRS: lambda: bridge(tokens_BT), THEIRS_CACHED: lambda: bridge.run_with_cache(tokens_BT)}
    return found


def measure(contenders: dict[str, Pass], rounds: int) -> dict[str, list[float]]:
    """Return seconds of CPU time, one per round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + WARM_UP_ROUNDS):
        for name, run in contenders.items():
            start = time.process_time()
            result = run()
            taken = time.process_time() - start
            del result  # freed outside the measurement, for all contenders
            if number >= WARM_UP_ROUNDS:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def compare(rounds: int, console: Console) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build_model(load_config("small", [])).eval()
    bare, bridge = without_hook_points(model), transformer_lens_twin(model)
    figures = {"memory given back": compare_passes(model, bare, bridge, rounds, console, "freed memory given back")}
    if keep_freed_memory():
        figures["memory kept"] = compare_passes(model, bare, bridge, rounds, console, "freed memory kept")
    console.print(f"{len(hook_points(model))} hook points; the fast pass, which training takes, meets none of them")
    if bridge is None:
        console.print("TransformerLens is not installed: pip install -e '.[transformer-lens]'")
    return figures


def compare_passes(
    model: Transformer, bare: Transformer, bridge: Any, rounds: int, console: Console, title: str
) -> dict[str, Any]:
    table = Table("one thread, CPU time", *(f"windows: {count}, ms" for count in WINDOWS), title=title)
    figures: dict[str, Any] = {}
    times: dict[int, dict[str, list[float]]] = {}
    with torch.no_grad():
        for count in WINDOWS:
            tokens_BT = torch.randint(3, model.vocab_size, (count, model.context_size))
            torch.testing.assert_close(bare(tokens_BT).logits, model(tokens_BT).logits, rtol=0, atol=0)
            # One window is quick, so its time varies more.
            times[count] = measure(passes(model, bare, bridge, tokens_BT), rounds * max(1, 8 // count))
    for name in times[WINDOWS[0]]:
        medians = [1e3 * statistics.median(times[count][name]) for count in WINDOWS]
        table.add_row(name, *(f"{median:.2f}" for median in medians))
        figures[name] = dict(zip(map(str, WINDOWS), medians, strict=True))
    console.print(table)
    lines = [
        ("hook points, on the watching pass (target 1.02)", WATCHED, BARE),
        ("all activations kept, of a watching pass", CACHED, WATCHED),
        ("all activations kept, of a fast pass", CACHED, FAST),
        ("TransformerLens: all activations kept, of a pass", THEIRS_CACHED, THEIRS),
        ("all activations kept, of TransformerLens's time", CACHED, THEIRS_CACHED),
    ]
    for text, name, base in lines:
        if name in times[WINDOWS[0]] and base in times[WINDOWS[0]]:
            ratios = {str(count): ratio(times[count], name, base) for count in WINDOWS}
            figures[text] = ratios
            console.print(f"{text}: " + ", ".join(f"{value:.3f} ({count})" for count, value in ratios.items()))
    return figures


def analyses(run: str, runs_dir: str, console: Console) -> dict[str, float]:
    """Return the seconds of each command after its model is loaded: medians after one warm-up."""
    from lumiere.cli import app
    from lumiere.cli.inspect import app as inspect_app
    from lumiere.persistence import loading

    loaded: list[float] = []
    open_model = loading.open_model

    def opened(*arguments: Any) -> Any:
        model = open_model(*arguments)
        loaded.append(time.perf_counter())
        return model

    loading.open_model = opened
    table = Table("lumiere inspect", "seconds", "exit code", title=f"after loading, {torch.get_num_threads()} threads")
    figures: dict[str, float] = {}
    for command in inspect_app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        seconds, exit_code = [], 0
        for _ in range(ANALYSIS_REPEATS + 1):
            arguments = ["inspect", name, "--run", run, "--runs-dir", runs_dir, *OPTIONS.get(name, [])]
            exit_code = CliRunner().invoke(app, arguments).exit_code
            seconds.append(time.perf_counter() - loaded[-1] if loaded else float("nan"))
        figures[name] = statistics.median(seconds[1:])
        table.add_row(name, f"{figures[name]:.2f}", str(exit_code))
    console.print(table)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="rounds with 32 windows; eight times as many with one")
    parser.add_argument("--run", help="a run on which to time each analysis; default: none")
    parser.add_argument("--runs-dir", default=os.environ.get("LUMIERE_RUNS_DIR") or "runs")
    parser.add_argument("--json", action="store_true", help="print the results as JSON at the end")
    arguments = parser.parse_args()
    logging.disable()  # TransformerLens logs what it does
    console = Console(width=100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures = compare(arguments.rounds, console)
    torch.set_num_threads(threads)
    if arguments.run:
        figures["analyses"] = analyses(arguments.run, arguments.runs_dir, console)
    if arguments.json:
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
