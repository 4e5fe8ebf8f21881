"""`lumiere inspect`: one command per analysis; without a command, a list of the questions they answer."""

import typer

from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.ablate import ablate
from lumiere.cli.inspect.attention import attention
from lumiere.cli.inspect.cache import cache
from lumiere.cli.inspect.circuit import circuit
from lumiere.cli.inspect.claims import claims
from lumiere.cli.inspect.diff import diff
from lumiere.cli.inspect.dynamics import dynamics
from lumiere.cli.inspect.heads import heads
from lumiere.cli.inspect.interchange import interchange
from lumiere.cli.inspect.lens import lens
from lumiere.cli.inspect.logits import logits
from lumiere.cli.inspect.patch import patch
from lumiere.cli.inspect.probe import probe
from lumiere.cli.inspect.report import report
from lumiere.cli.inspect.saliency import saliency
from lumiere.cli.inspect.steer import steer
from lumiere.cli.inspect.summary import summary
from lumiere.cli.inspect.tokens import tokens
from lumiere.cli.inspect.weights import weights
from lumiere.cli.usage import Commands

# What a result shows and what it does not; seconds on the card's model after loading, on two cores (docs/inspect.md).
ENTRIES = {
    summary: ("what the weights are and what looks broken, not how they are used", "1.3 s"),
    attention: ("where information is read from, not what it does there", "0.1 s"),
    heads: ("a pattern on one kind of text: evidence for a role, no proof", "0.4 s"),
    weights: ("what a head can read and write, not what it does on a text", "0.3 s"),
    lens: ("what the output vocabulary can read early, not all the model knows", "0.1 s"),
    logits: ("exact direct effects on a logit, not effects through later parts", "0.1 s"),
    ablate: ("a causal effect, unless other parts compensate for the missing one", "7 s"),
    patch: ("where the difference between two prompts is carried, not all of it", "0.1 s"),
    saliency: ("what moves a score away from a baseline, which is a choice", "0.1 s"),
    circuit: ("which edges matter when cut alone, not what backs them up", "5 s"),
    steer: ("that a direction moves a prediction beyond chance, not its meaning", "3 s"),
    probe: ("what a linear map can read, which the model need not use", "13 s"),
    interchange: ("a subspace carries a value, if the controls beside it do not", "25 s"),
    tokens: ("how good the predictions are here, beside n-gram baselines", "0.3 s"),
    cache: ("nothing by itself: activations for your own analysis", "0.1 s"),
    dynamics: ("when something appeared and what appeared with it, not why", "seconds"),
    diff: ("how two models differ on this text and in their weights", "2 s"),
    claims: ("whether statements hold for this model, with intervals", "seconds"),
    report: ("all of these on one page, each with its limits", "10 s"),
}

NOTES = """
Below each question is what its answer establishes; the time is that of a model
with a million parameters, after loading. lumiere inspect NAME --help lists the
options; -o FILE.svg draws the result, -o FILE.csv and --json give the numbers."""

app = typer.Typer(cls=Commands, invoke_without_command=True)
for analysis in ENTRIES:
    app.command()(analysis)


@app.callback()
def inspect(context: typer.Context) -> None:
    """Look inside a model. Without a command, list the analyses and what each one establishes."""
    if context.invoked_subcommand is not None:
        return
    rows = []
    for analysis, (establishes, cost) in ENTRIES.items():
        # A docstring begins with the question that the command answers.
        first_line = (analysis.__doc__ or "").partition("\n")[0]
        question = first_line.partition("?")[0] + "?" if "?" in first_line else first_line.partition(",")[0]
        rows.append((analysis.__name__, escape(question), cost, escape(establishes)))
    width, room = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, question, cost, establishes in rows:
        stdout().print(f"[bold]{name:{width + 1}}[/]{question:{room}} [dim]{cost:>7}[/]")
        stdout().print(f"[dim]{'':{width + 1}}{establishes}[/]")
    stdout().print(NOTES)
