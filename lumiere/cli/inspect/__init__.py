"""`lumiere inspect`: one command an analysis."""

import typer

from lumiere.cli.inspect.ablate import ablate
from lumiere.cli.inspect.attention import attention
from lumiere.cli.inspect.cache import cache
from lumiere.cli.inspect.diff import diff
from lumiere.cli.inspect.dynamics import dynamics
from lumiere.cli.inspect.heads import heads
from lumiere.cli.inspect.lens import lens
from lumiere.cli.inspect.logits import logits
from lumiere.cli.inspect.report import report
from lumiere.cli.inspect.summary import summary
from lumiere.cli.inspect.tokens import tokens

app = typer.Typer(no_args_is_help=True, help="Look inside a model: one command an analysis.")
for command in (summary, attention, heads, lens, logits, ablate, tokens, cache, dynamics, diff, report):
    app.command()(command)


@app.callback()
def about() -> None:
    """Look inside a model: one command an analysis."""
