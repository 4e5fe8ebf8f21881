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
    {"errors", "programs", "__init__"},
    {"files", "device", "distributed"},
    {"config"},
    {"components"},
    {"models", "data"},
    {"persistence"},
    {"evaluation", "generation"},
    {"training", "interpret"},
    {"report", "export"},
    {"cli"},
    {"__main__"},
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
            imported = "__init__" if names[:1] == ["__version__"] else "".join(names[:1])
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
    "runs ls|runs ls --status finished --sort loss --json|runs tag aaaa baseline|runs note aaaa text": SLOW,
    "runs prune --dry-run|runs rm aaaa --yes": SLOW,
}
LOADED = """
import sys
from lumiere.cli import main
sys.argv = ["lumiere", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded:", *({unwanted!r} & sys.modules.keys()))
"""
SEVERAL = """
import sys
from lumiere.cli import app
for command in {commands!r}:
    try:
        app(command.split())
    except SystemExit as stop:
        assert not stop.code, command
    print("loaded by", command, file=sys.stderr)
    assert not {unwanted!r} & sys.modules.keys(), {unwanted!r} & sys.modules.keys()
"""


def run_script(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result


def loaded(arguments: Sequence[str], unwanted: set[str], **variables: str) -> set[str]:
    """Run a command in a process of its own; return those of the unwanted modules that it loads."""
    result = run_script(LOADED.format(arguments=list(arguments), unwanted=unwanted), **variables)
    return set(result.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(("commands", "unwanted"), LIGHT.items())
def test_light_commands_load_nothing_heavy(commands: str, unwanted: set[str]) -> None:
    line = '{"step": 1, "tokens": 5, "time": 0.5, "loss": 8.0}\n'
    for name in (RUN, RUN.replace("aaaaaaaa", "bbbbbbbb")):
        (Path("runs") / name / "checkpoints").mkdir(parents=True)
        (Path("runs") / name / "run.json").write_text('{"status": "finished", "dataset": "stories"}')
        (Path("runs") / name / "metrics.jsonl").write_text(line)
        (Path("runs") / name / "config.yaml").write_text("training: {seed: 1}")
    run_script(SEVERAL.format(commands=commands.split("|"), unwanted=unwanted))


def test_main_loads_nothing_heavy() -> None:
    assert loaded(["--version"], HEAVY) == set()


def test_generating_loads_no_compiler(trained_run: Run) -> None:
    """The first token of a cold shell would wait a second for it."""
    arguments = ["generate", "-n", "3", "--runs-dir", str(trained_run.path.parent)]
    assert loaded(arguments, {"torch._dynamo", "datasets", "sympy"}) == set()
