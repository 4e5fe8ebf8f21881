"""`lumiere inspect summary`."""

from typing import TYPE_CHECKING, Annotated

import typer

from lumiere.cli.console import show_note
from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    import numpy as np

    from lumiere.data.batches import Batch
    from lumiere.interpret.summary import ModelSummary

BATCH_SIZE = 32

NumWindows = Annotated[
    int, typer.Option("--windows", metavar="N", min=0, help="Validation windows to run; 0 for the weights alone.")
]


@analysis(text=False)
def summary(subject: Subject, windows: NumWindows = 256) -> "Analysis[ModelSummary]":
    """What is in this model? Parameters, norms, ranks, gains, what each part does, dead neurons, and warnings."""
    from lumiere.cli.inspect.summary_view import show
    from lumiere.interpret.summary import summarize
    from lumiere.report.figures.bars import draw_summary

    batches, token_counts, source = choose_text(subject, windows)
    return Analysis(
        compute=lambda model: summarize(model, batches, token_counts),
        show=lambda result: show(result, subject.opened.tokenizer),
        draw=draw_summary,
        source=source,
    )


def choose_text(subject: Subject, num_windows: int) -> "tuple[list[Batch], np.ndarray | None, str]":
    """Validation windows, how often each token stands in the training split, and words about them.

    Without the corpus there is neither: then the weights have to do, and a line says so.
    """
    from lumiere.cli.inspect.batches import drawn_batches
    from lumiere.cli.inspect.vocabulary import count_tokens
    from lumiere.persistence.loading import open_corpus

    try:
        corpus = open_corpus(subject.opened, "restore it as it was")
    except LumiereError as error:
        show_note(f"{error.message}: what needs a text is left out")
        return [], None, "weights alone"
    token_counts = count_tokens(corpus.splits["train"].ids, subject.opened.model.vocab_size)
    if num_windows == 0:
        return [], token_counts, "weights, and the training split's tokens"
    batch_size = min(BATCH_SIZE, num_windows)
    batches, source = drawn_batches(subject, corpus, -(-num_windows // batch_size), batch_size)
    return batches, token_counts, source
