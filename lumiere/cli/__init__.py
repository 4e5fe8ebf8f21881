"""The `lumiere` command. It only assembles: each command is a file, and nothing heavy loads before one runs."""

import os
import sys
from typing import Annotated

import typer

from lumiere import __version__
from lumiere.cli.console import guarded
from lumiere.cli.evaluate import evaluate
from lumiere.cli.export import export
from lumiere.cli.generate import generate
from lumiere.cli.inspect import app as inspect_app
from lumiere.cli.runs import app as runs_app
from lumiere.cli.tokenize import tokenize
from lumiere.cli.train import train
from lumiere.files import is_writable

SPIN_COUNT = 3000
"""Rounds that a thread of OpenMP spins while it waits for the others, before it sleeps."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.command()(guarded(tokenize))
app.command()(guarded(train))
app.command("eval")(guarded(evaluate))
app.command()(guarded(generate))
app.command()(guarded(export))
app.add_typer(inspect_app, name="inspect")
app.add_typer(runs_app, name="runs")


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lumiere {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Train small GPT-style transformers and look inside them.

    Begin with [bold]lumiere train tiny[/]: two minutes, no network.
    """


def sleep_while_waiting() -> None:
    """Let waiting threads sleep sooner than OpenMP's own 300,000 rounds, unless the user has chosen how they wait.

    On a machine that does other things too, the spinning takes the core from what is waited for: eight times slower
    here (benchmarks/waiting.py), and no quicker on an idle one. OpenMP reads it once, when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def move_caches() -> None:
    """Let the Hugging Face libraries and Matplotlib use `LUMIERE_CACHE_DIR` if the home folder cannot be written to.

    They read these variables once, when they are imported.
    """
    ours = os.environ.get("LUMIERE_CACHE_DIR")
    if not ours:
        return
    for variable, name, base, default in (
        ("HF_HOME", "huggingface", "XDG_CACHE_HOME", "~/.cache"),
        ("MPLCONFIGDIR", "matplotlib", "XDG_CONFIG_HOME", "~/.config"),
    ):
        if variable not in os.environ and not is_writable(os.environ.get(base) or os.path.expanduser(default)):
            os.environ[variable] = os.path.join(os.path.abspath(ours), name)


def main() -> None:
    """The entry point of the installed command."""
    sleep_while_waiting()
    move_caches()
    try:
        app(prog_name="lumiere")
    except SystemExit as ending:
        from lumiere.components.world import World

        if World.of_environment().size > 1:
            leave_at_once(ending.code)
        raise


def leave_at_once(code: str | int | None) -> None:
    """End this process without the interpreter's own ending.

    Threads of torch live on after a training by several processes. Now and then a process was aborted while it ended
    ("terminate called without an active exception"), which torchrun takes for the failure of a training that succeeded.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
