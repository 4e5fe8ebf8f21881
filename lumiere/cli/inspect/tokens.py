"""`lumiere inspect tokens`."""

from typing import TYPE_CHECKING

from lumiere.cli.console import escape, show_note, stdout
from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.errors import LumiereError
from lumiere.persistence.loading import OpenedModel, open_corpus

if TYPE_CHECKING:
    from lumiere.data.tokenizer import Tokenizer
    from lumiere.evaluation.ngrams import BigramModel
    from lumiere.interpret.token_losses import TokenLosses

STYLES = ((1.0, "green"), (4.0, "default"), (7.0, "yellow"))
"""Of losses below a bound; above the last one it is red."""


@analysis(text=True)
def tokens(subject: Subject) -> "Analysis[TokenLosses]":
    """How well is each token predicted? Loss, surprisal, entropy and rank, beside models that only count.

    The unigram and the bigram model are fitted to the training split of the run.
    """
    from lumiere.interpret.token_losses import token_losses
    from lumiere.report.figures.heat_maps import draw_tokens

    opened, ids = subject.opened, subject.tokens
    if len(ids) < 2:
        raise LumiereError("the text has one token, and nothing to predict from it", "give a longer one")
    bigram = fitted_bigram(opened)
    unigram = bigram.unigram if bigram else None
    return Analysis(
        compute=lambda model: token_losses(model, ids, unigram, bigram),
        show=lambda result: show(result, opened.tokenizer),
        draw=lambda result: draw_tokens(result, subject.label),
        about={"baselines": "the run's training split" if bigram else None},
    )


def fitted_bigram(opened: OpenedModel) -> "BigramModel | None":
    """The bigram model, which holds the unigram model, of the run's own corpus; None, with a note, without it."""
    from lumiere.evaluation.ngrams import BigramModel

    try:
        split = open_corpus(opened, "restore it as it was").splits["train"]
    except LumiereError as error:
        show_note(f"no baselines: {error.message}")
        return None
    return BigramModel.fit(split.ids, split.offsets, opened.config.tokenizer.vocab_size)


def show(result: "TokenLosses", tokenizer: "Tokenizer") -> None:
    """A line a token, coloured by its loss, and the means."""
    from lumiere.report.figures.figure import LABEL_WIDTH, fitted, rank_label

    baselines = {
        name: losses
        for name, losses in (("unigram", result.unigram_losses), ("bigram", result.bigram_losses))
        if losses is not None
    }
    names = "".join(f"{name:>9}" for name in baselines)
    stdout().print(
        f"[bold]{'token':>{LABEL_WIDTH}}{'loss':>8}{'bits':>7}{'entropy':>9}{'rank':>6}{names}  first choice[/]"
    )
    for index, token in enumerate(result.tokens[1:]):
        loss = float(result.losses[index])
        style = next((style for bound, style in STYLES if loss < bound), "red")
        counted = "".join(f"{losses[index]:>9.2f}" for losses in baselines.values())
        choice = fitted(tokenizer.label(int(result.predictions[index])))
        stdout().print(
            f"[{style}]{escape(fitted(tokenizer.label(token)).rjust(LABEL_WIDTH))}{loss:>8.2f}[/]"
            f"{result.surprisals[index]:>7.1f}{result.entropies[index]:>9.2f}{rank_label(result.places[index]):>6}{counted}"
            f"  {escape(choice)} {result.probabilities[index]:.0%}"
        )
    means = "".join(f"{losses.mean():>9.2f}" for losses in baselines.values())
    firsts = f"{result.on_top.mean():.0%} first"
    stdout().print(
        f"[bold]{'mean':>{LABEL_WIDTH}}{result.losses.mean():>8.2f}{result.surprisals.mean():>7.1f}"
        f"{result.entropies.mean():>9.2f}{'':6}{means}  {firsts}[/]\n"
    )
    stdout().print("loss, entropy, unigram and bigram in nats; rank 0 is the first choice")
