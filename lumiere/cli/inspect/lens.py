"""`lumiere inspect lens`."""

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.cli.inspect.options import Positions, TopK, parse_indices
from lumiere.cli.inspect.vocabulary import parse_token
from lumiere.errors import LumiereError, nearest

if TYPE_CHECKING:
    from lumiere.interpret.logit_lens import LogitLens

STATISTICS = ("top", "probability", "rank", "entropy", "kl")

Statistic = Annotated[
    str, typer.Option("--stat", metavar="STAT", help=f"What each cell shows: {', '.join(STATISTICS)}.")
]
Sublayers = Annotated[bool, typer.Option("--sublayers", help="Look after the attention of each block too.")]
Target = Annotated[
    Optional[str],  # noqa: UP045 (Typer reads this form)
    typer.Option("--target", metavar="TOKEN", help="The token to look for. \\[default: the next of the text]"),
]


@analysis(text=True)
def lens(
    subject: Subject,
    stat: Statistic = "top",
    sublayers: Sublayers = False,
    target: Target = None,
    pos: Positions = None,
    top_k: TopK = 5,
) -> "Analysis[LogitLens]":
    """What would the model say if it stopped early? The logit lens: rows are tokens, columns the layers.

    The first column often repeats the token itself: the output head is the token embedding, so this is no error.
    --top-k is for --json and -o.
    """
    from lumiere.cli.inspect.lens_view import show
    from lumiere.interpret.logit_lens import logit_lens
    from lumiere.report.figures.heat_maps import draw_lens

    if stat not in STATISTICS:
        guess = nearest(stat, STATISTICS)
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(STATISTICS)}"
        raise LumiereError(f"there is no statistic {stat!r}", hint)
    opened, tokens = subject.opened, subject.tokens
    vocab_size = opened.model.vocab_size
    if top_k > vocab_size:
        raise LumiereError(f"there are no {top_k} tokens to list", f"the model has {vocab_size}")
    positions = parse_indices(pos, len(tokens), "position")
    wanted = None if target is None else parse_token(target, opened.tokenizer)
    words = None if wanted is None else subject.label(wanted)
    return Analysis(
        compute=lambda model: logit_lens(model, tokens, positions, sublayers, wanted, top_k),
        show=lambda result: show(result, stat, subject.label, words),
        draw=lambda result: draw_lens(result, stat, subject.label, words),
    )
