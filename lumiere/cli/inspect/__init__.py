"""`lumiere inspect`: one command an analysis."""

import typer

from lumiere.cli.inspect.attention import attention
from lumiere.cli.inspect.heads import heads

app = typer.Typer(no_args_is_help=True, help="Look inside a model: one command an analysis.")
app.command()(attention)
app.command()(heads)


@app.callback()
def about() -> None:
    """Look inside a model: one command an analysis."""
