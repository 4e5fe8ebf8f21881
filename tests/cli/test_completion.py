"""TAB: what a shell is offered, and that nothing goes wrong on the way."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lumiere.cli import app
from tests.test_architecture import check_light

RUNS = ["run_hiq6ihsb_20250819_001808", "run_hik2aaaa_20250820_001808", "run_zzz00000_20250818_001808"]
HEAVY = {"torch", "pydantic", "datasets", "tokenizers", "numpy", "safetensors", "yaml", "rich.console"}


def offered(line: str, shell: str = "bash") -> list[str]:
    """What completing the last word of `line` gives, as Typer hands it to the shell."""
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    asked |= {"_LUMIERE_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(app, [], env=asked, prog_name="lumiere")
    assert result.exit_code == 0
    assert result.stderr == ""
    return result.stdout.split()


@pytest.fixture
def runs() -> Path:
    """Three runs; one has checkpoints, one a record that is damaged."""
    for name in RUNS:
        (Path("runs") / name / "checkpoints").mkdir(parents=True)
    folder = Path("runs") / RUNS[0] / "checkpoints"
    for name in ("step-00000512", "step-00000001", ".step-00000002.0a1b2c3d.tmp", "$(touch pwned)"):
        (folder / "snapshots" / name).mkdir(parents=True)
    (folder / "pointers.json").write_text('{"best": "step-00000003", "latest": "step-00000003"}')
    (Path("runs") / RUNS[1] / "run.json").write_text('{"status": "\x1b[31m$(touch pwned)')
    (Path("runs") / "run_hibroken_2025").mkdir()
    return Path("runs")


OFFERED = """
    lumiere eval hi -> hik2aaaa hiq6ihsb
    lumiere eval hiq -> hiq6ihsb
    lumiere runs show run_z -> run_zzz00000_20250818_001808
    lumiere runs card l -> latest
    lumiere train --resume z -> zzz00000
    lumiere generate --run hik -> hik2aaaa
    lumiere inspect attention -r hik -> hik2aaaa
    lumiere eval nothing ->
    lumiere generate --run hiq6 -c step-00000 -> step-00000001 step-00000512
    lumiere eval hi --checkpoint b ->
    lumiere eval zzz --checkpoint b ->
    lumiere generate --checkpoint b ->
    lumiere eval --runs-dir elsewhere hi ->
    lumiere inspect att -> attention
    lumiere runs sh -> show
"""


@pytest.mark.usefixtures("runs")
def test_what_tab_offers() -> None:
    for line, names in (row.strip().split(" ->") for row in OFFERED.splitlines() if row.strip()):
        assert offered(line) == names.split(), line
    assert offered("lumiere eval ") == ["hik2aaaa", "hiq6ihsb", "zzz00000", "latest"]
    assert offered("lumiere eval hiq --checkpoint ") == ["best", "latest", "step-00000001", "step-00000512"]
    # Other shells.
    assert " ".join(offered("lumiere eval hiq", "zsh")) == """_arguments '*: :(("hiq6ihsb"))'"""
    assert offered("lumiere eval hi", "fish") == ["hik2aaaa", "hiq6ihsb"]


def test_tab_offers_shipped_configs_and_files() -> None:
    for name in ("mine.yaml", "my runs.yaml", "notes.txt", ".hidden.yaml", "$(id).yaml", "`id`.toml", "configs/m.toml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    (Path("configs") / "deep").mkdir()
    (Path("configs") / "deep" / "er.yml").touch()
    (Path("folder.yaml")).mkdir()
    assert offered("lumiere train ") == ["induction", "small-fast", "small", "tiny", "mine.yaml", "configs/m.toml"]
    assert offered("lumiere train m") == ["mine.yaml"]
    assert offered("lumiere train configs/") == ["configs/m.toml", "configs/deep/er.yml"]
    assert offered("lumiere tokenize t") == ["tiny"]
    assert offered("lumiere train ./m") == ["./mine.yaml"]


def test_a_runs_directory_that_is_none_gives_silence() -> None:
    assert offered("lumiere eval x") == []
    Path("runs").write_text("a file")
    assert offered("lumiere eval x") == []
    assert offered("lumiere eval x -c b") == []


@pytest.mark.parametrize("line", ["lumiere train t", "lumiere eval h -c b"])
def test_tab_loads_nothing_heavy(runs: Path, line: str) -> None:
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_LUMIERE_COMPLETE": "complete_bash"}
    check_light([""], HEAVY, **asked)


def test_a_real_bash_completes(runs: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this machine")
    Path("bin").mkdir()
    command = Path("bin") / "lumiere"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lumiere "$@"\n')
    command.chmod(0o755)
    script = (
        "source <(lumiere --show-completion)\ncomplete -p lumiere\n"
        'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _lumiere_completion lumiere;'
        ' echo "${COMPREPLY[@]}"; }\n'
        "ask lumiere eval hi\nask lumiere eval hiq -c step-00000001\nask lumiere train ti\n"
    )
    environment = os.environ | {"PATH": f"{Path('bin').absolute()}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, env=environment)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "complete -o default -F _lumiere_completion lumiere",
        "hik2aaaa hiq6ihsb",
        "step-00000001",
        "tiny",
    ]
    assert not Path("pwned").exists()
