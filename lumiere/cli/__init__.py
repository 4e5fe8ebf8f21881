"""The `lumiere` command. It only assembles: each command is a file, and nothing heavy loads before one runs."""

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


def main() -> None:
    """The entry point of the installed command."""
    app(prog_name="lumiere")
