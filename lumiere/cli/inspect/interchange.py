"""`lumiere inspect interchange`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.command import analysis, show_wrapped

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.interpret.interchange import Interchange

Pairs = Annotated[
    Path, Option("--pairs", metavar="FILE", help='One {"base": ..., "source": ..., "label": ...} a line.')
]
Layer = Annotated[int, Option("--layer", "-l", metavar="N", help="Change the stream after this block; -1 is the last.")]
Position = Annotated[int, Option(metavar="N", help="Position of the base prompt that is changed.")]
SourcePosition = Annotated[
    int | None, Option(metavar="N", help="Position of the source prompt that is read. \\[default: --pos]")
]
Rank = Annotated[int, Option(metavar="K", min=1, help="Dimensions of the subspace.")]
Steps = Annotated[int, Option(metavar="N", min=1, help="Steps of training a subspace.")]
Seeds = Annotated[int, Option(metavar="N", min=1, help="Number of halves of the pairs to fit to.")]


@analysis(
    Inspect.interchange, pairs=Pairs, layer=Layer, pos=Position, source_pos=SourcePosition, rank=Rank, steps=Steps,
    seeds=Seeds,
)  # fmt: skip
def interchange(found: "Analysis[Interchange]") -> None:
    """Does a subspace of the stream carry a variable? Interchange interventions, and DAS with its controls.

    The label is the token that should follow the base prompt if the variable had the value that it has in the source.
    """
    result, label = found.result, found.target.label
    show_wrapped(
        f"stream after block {result.layer}, position {result.base_position} of the base from position "
        f"{result.source_position} of the source, {result.rank} dimensions; {result.num_tested} pairs tested, "
        f"{result.num_fitted} fitted to by {result.steps} steps, {result.accuracies.shape[1]} seeds\n"
        f"answers: {' '.join(label(token) for token in result.answers)}\n",
        markup=False,
    )
    stdout().print(f"[bold]{'':24}{'IIA':>7}{'least':>8}{'most':>8}{'log-odds':>10}[/]")
    for method, accuracies, odds in zip(result.methods, result.accuracies, result.log_odds, strict=True):
        stdout().print(
            f"{escape(method):24}{accuracies.mean():>7.1%}{accuracies.min():>8.1%}{accuracies.max():>8.1%}"
            f"{odds.mean():>+10.2f}"
        )
    stdout().print(f"[dim]{'chance':24}{1 / len(result.answers):>7.1%}[/]\n")
