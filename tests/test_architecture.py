"""Imports run downwards, files stay small, and light commands load no heavy library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        ("--help", HEAVY),
        ("--version", HEAVY),
        ("train --help", HEAVY),
        ("inspect attention --help", HEAVY),
        ("export --help", HEAVY),
        ("inspect lens --help", HEAVY),
        ("inspect diff --help", HEAVY),
        ("inspect logits --help", HEAVY),
        ("inspect summary --help", HEAVY),
        ("inspect heads --help", HEAVY),
        ("inspect report --help", HEAVY),
        ("train tiny --print-config", HEAVY),
        ("runs ls", SLOW),
        ("runs ls --status finished --sort loss --json", SLOW),
        ("runs tag aaaa baseline", SLOW),
        ("runs note aaaa text", SLOW),
        ("runs prune --dry-run", SLOW),
        ("runs rm aaaa --yes", SLOW),
        ("runs show aaaa", HEAVY),
        ("runs compare aaaa bbbb", HEAVY),
        ("runs plot aaaa bbbb", HEAVY),
        ("runs watch aaaa", HEAVY),
    ],
)
def test_light_commands_load_nothing_heavy(arguments: str, unwanted: set[str]) -> None:
    line = '{"step": 1, "tokens": 5, "time": 0.5, "loss": 8.0}\n'
    for name in (RUN, RUN.replace("aaaaaaaa", "bbbbbbbb")):
        (Path("runs") / name / "checkpoints").mkdir(parents=True)
        (Path("runs") / name / "run.json").write_text('{"status": "finished", "dataset": "stories"}')
        (Path("runs") / name / "metrics.jsonl").write_text(line)
        (Path("runs") / name / "config.yaml").write_text("training: {seed: 1}")
    script = (
        "import sys\n"
        "from lumiere.cli import main\n"
        f"sys.argv = ['lumiere', *{arguments.split()!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        f"print('loaded:', *({unwanted!r} & sys.modules.keys()))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded:"


def test_generating_loads_no_compiler(trained_run: Run) -> None:
    """The first token of a cold shell would wait a second for it."""
    script = (
        "import sys\n"
        "from lumiere.cli import main\n"
        f"sys.argv = ['lumiere', 'generate', '-n', '3', '--runs-dir', {str(trained_run.path.parent)!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "print('loaded:', *({'torch._dynamo', 'datasets', 'sympy'} & sys.modules.keys()))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded:"
