"""`lumiere inspect tokens`."""

from typing import TYPE_CHECKING

from lumiere.api.inspection import Inspect
from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.command import analysis

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.api.target import InspectTarget
    from lumiere.interpret.token_losses import TokenLosses

STYLES = ((1.0, "green"), (4.0, "default"), (7.0, "yellow"))
"""Styles of losses below a bound; above the last one it is red."""


@analysis(Inspect.tokens)
def tokens(found: "Analysis[TokenLosses]") -> None:
    """How well is each token predicted? Loss, surprisal, entropy and rank, beside n-gram baselines.

    The unigram and the bigram model are fitted to the training split of the run.
    """
    show_losses(found.result, found.target)


def show_losses(result: "TokenLosses", target: "InspectTarget") -> None:
    """Print one line per token, colored by its loss, and the means."""
    from lumiere.report.figures.figure import LABEL_WIDTH, fitted, rank_label

    candidates = {"unigram": result.unigram_losses, "bigram": result.bigram_losses}
    baselines = {name: losses for name, losses in candidates.items() if losses is not None}
    label = target.opened.tokenizer.label
    names = "".join(f"{name:>9}" for name in baselines)
    stdout().print(
        f"[bold]{'token':>{LABEL_WIDTH}}{'loss':>8}{'bits':>7}{'entropy':>9}{'rank':>6}{names}  top prediction[/]"
    )
    for index, token in enumerate(result.tokens[1:]):
        loss = float(result.losses[index])
        style = next((style for bound, style in STYLES if loss < bound), "red")
        counted = "".join(f"{losses[index]:>9.2f}" for losses in baselines.values())
        prediction = escape(fitted(label(int(result.predictions[index]))))
        stdout().print(
            f"[{style}]{escape(fitted(label(token)).rjust(LABEL_WIDTH))}{loss:>8.2f}[/]"
            f"{result.surprisals[index]:>7.1f}{result.entropies[index]:>9.2f}{rank_label(result.places[index]):>6}{counted}"
            f"  {prediction} {result.probabilities[index]:.0%}"
        )
    means = "".join(f"{losses.mean():>9.2f}" for losses in baselines.values())
    stdout().print(
        f"[bold]{'mean':>{LABEL_WIDTH}}{result.losses.mean():>8.2f}{result.surprisals.mean():>7.1f}"
        f"{result.entropies.mean():>9.2f}{'':6}{means}  {result.on_top.mean():.0%} top-1[/]\n"
    )
    stdout().print("loss, entropy, unigram and bigram in nats; rank 0 is the most probable token")
