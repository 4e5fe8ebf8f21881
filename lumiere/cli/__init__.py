"""The `lumiere` command. Each command is a file; nothing heavy is imported before a command runs."""

import os
import sys
from typing import Annotated

import typer
from typer import Exit, Option

from lumiere import __version__
from lumiere.cli.console import print_error
from lumiere.cli.evaluate import evaluate
from lumiere.cli.export import export
from lumiere.cli.generate import generate
from lumiere.cli.import_model import import_model
from lumiere.cli.inspect import app as inspect_app
from lumiere.cli.runs import app as runs_app
from lumiere.cli.streams import OutputError, open_streams
from lumiere.cli.tokenize import tokenize
from lumiere.cli.train import train
from lumiere.cli.usage import Commands
from lumiere.files import is_writable

SPIN_COUNT = 10_000
"""Rounds that a waiting OpenMP thread spins before it sleeps."""

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.command()(tokenize)
app.command()(train)
app.command("eval")(evaluate)
app.command()(generate)
app.command("import")(import_model)
app.command()(export)
app.add_typer(inspect_app, name="inspect")
app.add_typer(runs_app, name="runs")


def print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"lumiere {__version__}\n")
        raise Exit


@app.callback()
def about(
    version: Annotated[
        bool, Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train small GPT-style transformers and look inside them.

    Start with [bold]lumiere train tiny[/]: two minutes, no network.
    """


def sleep_while_waiting() -> None:
    """Let waiting threads sleep after fewer rounds than OpenMP's default of 300,000, unless the user chose otherwise.

    On a busy machine, spinning takes the core from the thread that is waited for: the default makes a step 1.3 times
    as slow as 10,000 rounds. On an idle machine, waking costs time: 10,000 rounds make a step 1.05 times as slow, 3,000
    rounds 1.2 times (benchmarks/waiting.py). OpenMP reads the count once, when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def move_caches() -> None:
    """Point Hugging Face libraries and Matplotlib to `LUMIERE_CACHE_DIR` if the home folder is not writable.

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
    """Run the command line and exit."""
    sleep_while_waiting()
    move_caches()
    open_streams()
    code = run_app()
    if "RANK" in os.environ:
        from lumiere.distributed import ProcessGroup

        if ProcessGroup.from_environment().size > 1:
            # Threads of torch outlive distributed training and sometimes abort the process during the interpreter's
            # cleanup ("terminate called without an active exception"), which torchrun would report as a failed run.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def run_app() -> int:
    """Run the command; return its exit code after flushing stdout."""
    code = 0
    try:
        try:
            app()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        sys.stdout.flush()
    except OutputError as error:
        if error.problem is not None:
            print_error(error.problem)
        code = code or error.exit_code
    return code
