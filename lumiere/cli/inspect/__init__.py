"""`lumiere inspect`: one command an analysis."""

import typer

from lumiere.cli.inspect.attention import attention

app = typer.Typer(no_args_is_help=True, help="Look inside a model: one command an analysis.")
app.command()(attention)


@app.callback()
def about() -> None:
    """Look inside a model: one command an analysis."""
