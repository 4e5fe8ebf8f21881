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
from lumiere.cli.inspect.overview import Entry, show_overview
from lumiere.cli.inspect.report import report
from lumiere.cli.inspect.summary import summary
from lumiere.cli.inspect.tokens import tokens
from lumiere.cli.usage import Commands

ENTRIES = (
    Entry(summary, "what is stored, and what looks broken; no use of it", "1.3 s"),
    Entry(attention, "where information is taken from, not what it does there", "0.1 s"),
    Entry(heads, "a pattern on one kind of text: a hint at a role, no proof", "0.4 s"),
    Entry(lens, "what can be read early in the last layer's words, not all it knows", "0.1 s"),
    Entry(logits, "who writes the logit directly, exactly; not through later parts", "0.1 s"),
    Entry(ablate, "a cause: the loss without a part, unless others make up for it", "7 s"),
    Entry(tokens, "how good the model is here, beside models that only count", "0.3 s"),
    Entry(cache, "nothing yet: the numbers themselves, for an analysis of your own", "0.1 s"),
    Entry(dynamics, "when something came about, and what came with it; not why", "seconds"),
    Entry(diff, "how two models differ on this text and in their weights", "2 s"),
    Entry(report, "all of these at a glance, with the limits that each has", "10 s"),
)
"""The commands as they are listed; costs are those of docs/inspect.md, or a class where it depends on the run."""

app = typer.Typer(cls=Commands, invoke_without_command=True, help="Look inside a model: one command an analysis.")
for entry in ENTRIES:
    app.command()(entry.command)


@app.callback()
def about(context: typer.Context) -> None:
    """Look inside a model: one command an analysis. Without any, lists what each answers, and what that is worth."""
    if context.invoked_subcommand is None:
        show_overview(ENTRIES)
