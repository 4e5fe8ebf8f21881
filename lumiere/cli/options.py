"""What a shell offers after TAB: runs, checkpoints and configs.

A shell calls these in a process of its own at each TAB, so they load neither torch nor pydantic, and print nothing.
Names of files are offered only if they are harmless: Typer's script for zsh hands them to `eval`, the one for bash
splits and expands them.
"""

import functools
import os
import re
from collections.abc import Callable
from typing import Annotated

import typer

from lumiere.config.presets import SUFFIXES, shipped_configs
from lumiere.persistence.checkpoint_manager import checkpoint_names
from lumiere.persistence.runs import RunStore

HARMLESS = re.compile(r"[\w./%+,-]+")

Complete = Callable[[typer.Context, str], list[str]]


def quietly(complete: Complete) -> Complete:
    """`complete` without a word where it fails, and with only those names that begin with what is typed."""

    @functools.wraps(complete)
    def names(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            found = complete(ctx, incomplete)
        except Exception:
            return []
        return [name for name in found if name.startswith(incomplete) and HARMLESS.fullmatch(name)]

    return names


@quietly
def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """The ids of the runs, newest first; their full names once `run_` is typed."""
    runs = RunStore(ctx.params.get("runs_dir")).all()
    if incomplete.startswith("run_"):
        return [run.name for run in runs]
    return [*(run.id for run in runs), "latest"] if runs else []


@quietly
def complete_checkpoint(ctx: typer.Context, incomplete: str) -> list[str]:
    """The checkpoints of the run that stands on the line, or of the newest."""
    # Parsing stops at the option that has no value yet, before arguments are given their names.
    reference = ctx.params.get("run") or next(iter(ctx.args), "latest")
    return checkpoint_names(RunStore(ctx.params.get("runs_dir")).open(reference))


@quietly
def complete_config(ctx: typer.Context, incomplete: str) -> list[str]:
    """The shipped configs by name, and the config files in the folder that is typed and in those one below it."""
    return [*shipped_configs(), *config_files(os.path.dirname(incomplete), depth=2)]


def config_files(folder: str, depth: int) -> list[str]:
    """Config files in `folder`, as they would be typed, and `depth - 1` levels below it; nothing that is hidden."""
    try:
        entries = sorted((e for e in os.scandir(folder or ".") if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError:
        return []
    files = [os.path.join(folder, e.name) for e in entries if e.name.endswith(SUFFIXES) and e.is_file()]
    if depth > 1:
        for entry in entries:
            files += config_files(os.path.join(folder, entry.name), depth - 1) if entry.is_dir() else []
    return files


CONFIG_HELP = "A YAML or TOML file, or a shipped config's name: tiny, induction, small, small-fast."
RUN_HELP = "A run's name, its id or the start of it, or latest."

Config = Annotated[str, typer.Argument(help=CONFIG_HELP, autocompletion=complete_config)]
OptionalConfig = Annotated[str | None, typer.Argument(help=CONFIG_HELP, autocompletion=complete_config)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as model.num_layers=6. Repeatable."),
]
# Text and not a Path, for which Typer would load pydantic: `runs ls` is to answer at once.
RunsDir = Annotated[
    str | None,
    typer.Option("--runs-dir", metavar="DIR", help="Where the runs are. \\[default: $LUMIERE_RUNS_DIR or runs]"),
]
RunReference = Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP, autocompletion=complete_run)]
RunReferences = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Names, ids or the start of them, or latest.", autocompletion=complete_run),
]
RunOption = Annotated[str, typer.Option("--run", "-r", metavar="RUN", help=RUN_HELP, autocompletion=complete_run)]
CheckpointName = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        "-c",
        metavar="NAME",
        help="best, latest, previous, or a step with a snapshot.",
        autocompletion=complete_checkpoint,
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, for scripts.")]
