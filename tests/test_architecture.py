"""Imports run downwards, files stay small, and light commands load no heavy library."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lumiere.persistence.runs import Run

PACKAGE = Path(__file__).parents[1] / "lumiere"

# From the bottom up. A part may import parts of lower layers, and nothing else of Lumiere.
LAYERS = [
    {"errors", "programs"},
    {"files", "device", "distributed"},
    {"config"},
    {"components"},
    {"models", "data"},
    {"persistence"},
    {"evaluation", "generation"},
    {"training", "interpret", "lab"},
    {"importing"},
    {"report", "export"},
    {"api"},
    {"cli"},
    {"__init__", "__main__"},
]
MAX_LINES = 700
TERMINAL = {"typer", "rich", "click"}


def layer_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def part_of(path: Path) -> str:
    """The folder of the package that a file is in, or the name of a file that is in none."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """The dotted modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


def test_imports_run_downwards() -> None:
    offenders = []
    for path in FILES:
        part = part_of(path)
        for module in imports(path):
            package, *names = module.split(".")
            imported = "" if names[:1] == ["__version__"] else "".join(names[:1])
            if package == "lumiere" and imported not in {"", part} and layer_of(imported) >= layer_of(part):
                offenders.append(f"{path} imports {module}")
            if (package in TERMINAL and part != "cli") or package == "click":
                offenders.append(f"{path} imports {module}")
    assert not offenders


def test_files_stay_small() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


HEAVY = {"torch", "datasets", "tokenizers", "numpy", "safetensors", "jinja2"}
# What takes a tenth of a second each: a list or a label is to be there at once.
SLOW = HEAVY | {"pydantic", "rich", "yaml", "matplotlib"}
RUN = "run_aaaaaaaa_20250819_001808"


LIGHT = {
    "--help|--version|train --help|inspect attention --help|export --help|inspect lens --help": HEAVY,
    "inspect diff --help|inspect logits --help|inspect summary --help|inspect heads --help": HEAVY,
    "inspect report --help|train tiny --print-config": HEAVY,
    "runs show aaaa|runs compare aaaa bbbb|runs plot aaaa bbbb|runs watch aaaa": HEAVY,
    "runs push aaaa away|runs pull away|runs pull --help": HEAVY | {"fsspec"},
    "runs ls|runs ls --status finished --sort loss --json|runs tag aaaa baseline|runs note aaaa text": SLOW,
    "runs prune --dry-run|runs rm aaaa --yes": SLOW,
}
SCRIPT = """
import sys
from lumiere.cli import app, main
for number, command in enumerate({commands!r}):
    sys.argv = ["lumiere", *command.split()]
    try:
        app() if number else main()  # main opens the streams, once in a process
    except SystemExit as stop:
        assert not stop.code, command
    assert not {unwanted!r} & sys.modules.keys(), (command, {unwanted!r} & sys.modules.keys())
"""


def check_light(commands: Sequence[str], unwanted: set[str], **variables: str) -> None:
    """Run commands in one process of their own, which must not load the unwanted modules."""
    script = SCRIPT.format(commands=commands, unwanted=unwanted)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | variables)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("commands", "unwanted"), LIGHT.items())
def test_light_commands_load_nothing_heavy(commands: str, unwanted: set[str]) -> None:
    line = '{"step": 1, "tokens": 5, "time": 0.5, "loss": 8.0}\n'
    for name in (RUN, RUN.replace("aaaaaaaa", "bbbbbbbb")):
        (Path("runs") / name / "checkpoints").mkdir(parents=True)
        (Path("runs") / name / "run.json").write_text('{"status": "finished", "dataset": "stories"}')
        (Path("runs") / name / "metrics.jsonl").write_text(line)
        (Path("runs") / name / "config.yaml").write_text("training: {seed: 1}")
    check_light(commands.split("|"), unwanted)


@pytest.mark.slow
def test_generating_loads_no_compiler(trained_run: Run) -> None:
    """The first token of a cold shell would wait a second for it."""
    command = f"generate -n 3 --runs-dir {trained_run.path.parent}"
    check_light([command], {"torch._dynamo", "datasets", "sympy"})
