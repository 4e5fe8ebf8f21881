"""`lumiere inspect`: one command an analysis; without a command, a list of the questions they answer."""

from collections.abc import Callable
from dataclasses import dataclass

import typer

from lumiere.cli.console import escape, stdout
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
from lumiere.cli.usage import Commands


@dataclass(frozen=True)
class Entry:
    """A command as it is listed.

    Attributes:
        command: its docstring begins with the question that it answers.
        establishes: what the result shows and what it does not.
        cost: seconds on the card's model after loading, on two cores (docs/inspect.md).
    """

    command: Callable[..., None]
    establishes: str
    cost: str

    @property
    def question(self) -> str:
        first_line = (self.command.__doc__ or "").strip().partition("\n")[0]
        return first_line.partition("?")[0] + "?" if "?" in first_line else first_line.partition(",")[0]


ENTRIES = (
    Entry(summary, "what the weights are and what looks broken, not how they are used", "1.3 s"),
    Entry(attention, "where information is read from, not what it does there", "0.1 s"),
    Entry(heads, "a pattern on one kind of text: evidence for a role, no proof", "0.4 s"),
    Entry(lens, "what the output vocabulary can read early, not all the model knows", "0.1 s"),
    Entry(logits, "exact direct effects on a logit, not effects through later parts", "0.1 s"),
    Entry(ablate, "a causal effect, unless other parts compensate for the missing one", "7 s"),
    Entry(tokens, "how good the predictions are here, beside n-gram baselines", "0.3 s"),
    Entry(cache, "nothing by itself: activations for your own analysis", "0.1 s"),
    Entry(dynamics, "when something appeared and what appeared with it, not why", "seconds"),
    Entry(diff, "how two models differ on this text and in their weights", "2 s"),
    Entry(report, "all of these on one page, each with its limits", "10 s"),
)

NOTES = """
Below each question is what its answer establishes; the time is that of a model
with a million parameters, after loading. lumiere inspect NAME --help lists the
options; -o FILE.svg draws the result, -o FILE.csv and --json give the numbers."""

app = typer.Typer(cls=Commands, invoke_without_command=True)
for entry in ENTRIES:
    app.command()(entry.command)


@app.callback()
def inspect(context: typer.Context) -> None:
    """Look inside a model. Without a command, list the analyses and what each one establishes."""
    if context.invoked_subcommand is not None:
        return
    width = max(len(entry.command.__name__) for entry in ENTRIES) + 1
    room = max(len(entry.question) for entry in ENTRIES)
    for entry in ENTRIES:
        name, question = entry.command.__name__, escape(entry.question)
        stdout().print(f"[bold]{name:{width}}[/]{question:{room}} [dim]{entry.cost:>7}[/]")
        stdout().print(f"[dim]{'':{width}}{escape(entry.establishes)}[/]")
    stdout().print(NOTES)
