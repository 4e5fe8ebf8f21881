"""Options and arguments that several commands share, their checks and shell completion, and the model they name.

A shell runs a completion in a new process at each TAB, so completions load neither torch nor pydantic and print
nothing. They offer only file names without special characters: Typer's zsh script passes them to `eval`, and its bash
script splits and expands them.
"""

import functools
import glob
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from lumiere.cli.console import show_note
from lumiere.config.presets import SUFFIXES, shipped_configs
from lumiere.persistence.runs import RunStore

if TYPE_CHECKING:
    from lumiere.persistence.loading import OpenedModel

HARMLESS = re.compile(r"[\w./%+,-]+")

Complete = Callable[[typer.Context, str], list[str]]


def quietly(complete: Complete) -> Complete:
    """Return `complete` without its errors, and without names that do not start with what is typed."""

    @functools.wraps(complete)
    def names(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            found = complete(ctx, incomplete)
        except Exception:
            return []
        return [name for name in found if name.startswith(incomplete) and HARMLESS.fullmatch(name)]

    return names


def open_model(
    reference: str, checkpoint: str, device: str, runs_dir: str | None, max_tokens: int | None = None
) -> "OpenedModel":
    """Open a checkpoint of a run, with notes and progress on stderr; see `lumiere.persistence.loading.open_model`."""
    from lumiere.cli.progress import CorpusProgress
    from lumiere.persistence import loading

    return loading.open_model(reference, checkpoint, device, runs_dir, show_note, CorpusProgress, max_tokens)


@quietly
def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the ids of the runs, newest first, or their full names once `run_` is typed."""
    runs = RunStore(ctx.params.get("runs_dir")).all()
    if incomplete.startswith("run_"):
        return [run.name for run in runs]
    return [*(run.id for run in runs), "latest"] if runs else []


@quietly
def complete_checkpoint(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the checkpoints of the run on the command line, or of the newest."""
    # Parsing stops at the option without a value, before arguments are named.
    reference = ctx.params.get("run") or next(iter(ctx.args), "latest")
    from lumiere.persistence.checkpoint_manager import checkpoint_names

    return checkpoint_names(RunStore(ctx.params.get("runs_dir")).open(reference))


@quietly
def complete_config(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the presets, and the config files up to one folder below the typed one, without hidden ones."""
    folder = glob.escape(os.path.dirname(incomplete))
    paths = (path for pattern in ("*", "*/*") for path in sorted(glob.glob(os.path.join(folder, pattern))))
    return [*shipped_configs(), *(path for path in paths if path.endswith(SUFFIXES) and os.path.isfile(path))]


CONFIG = Argument(
    help="A YAML or TOML file, or a preset: tiny, induction, small, small-fast.", autocompletion=complete_config
)
RUN_HELP = "Run name, id, unique start of an id, tag, or latest."
RUNS_HELP = "Run names, ids, unique starts of ids, tags, or latest."
CHECKPOINT_HELP = "Use this checkpoint: best, latest, previous, or a step with a snapshot."
SET_HELP = "Override a setting, for example model.num_layers=6. Repeatable."
RUNS_DIR_HELP = "Use the runs in DIR. \\[default: $LUMIERE_RUNS_DIR or runs]"

Config = Annotated[str, CONFIG]
OptionalConfig = Annotated[str | None, CONFIG]
Overrides = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help=SET_HELP)]
# A str, because Typer imports pydantic for a Path, which would slow down `runs ls`.
RunsDir = Annotated[str | None, Option(metavar="DIR", help=RUNS_DIR_HELP)]
RunReference = Annotated[str, Argument(metavar="RUN", help=RUN_HELP, autocompletion=complete_run)]
RunReferences = Annotated[list[str], Argument(metavar="RUN...", help=RUNS_HELP, autocompletion=complete_run)]
RunOption = Annotated[str, Option("--run", "-r", metavar="RUN", help=RUN_HELP, autocompletion=complete_run)]
CheckpointName = Annotated[
    str, Option("--checkpoint", "-c", metavar="NAME", help=CHECKPOINT_HELP, autocompletion=complete_checkpoint)
]
MaxTokens = Annotated[
    int | None,
    Option(
        "--context-size",
        metavar="N",
        min=1,
        help="Give the model texts of at most N tokens. \\[default: its context; 512 if imported]",
    ),
]
Device = Annotated[str, Option("--device", metavar="DEVICE", help="Compute on auto, cpu, cuda, cuda:1 or mps.")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
