"""`lumiere inspect`: one command an analysis."""

import typer

from lumiere.cli.inspect.ablate import ablate
from lumiere.cli.inspect.attention import attention
from lumiere.cli.inspect.cache import cache
from lumiere.cli.inspect.tokens import tokens

app = typer.Typer(no_args_is_help=True, help="Look inside a model: one command an analysis.")
app.command()(attention)
app.command()(ablate)
app.command()(cache)
app.command()(tokens)


@app.callback()
def about() -> None:
    """Look inside a model: one command an analysis."""
