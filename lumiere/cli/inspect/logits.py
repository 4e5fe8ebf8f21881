"""`lumiere inspect logits`."""

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.cli.inspect.options import Positions, TopK, parse_indices
from lumiere.cli.inspect.vocabulary import parse_token
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.interpret.logit_attribution import LogitAttribution

Target = Annotated[
    Optional[str],  # noqa: UP045 (Typer reads this form)
    typer.Option("--target", metavar="TOKEN", help="The token to explain. \\[default: the most probable]"),
]
Versus = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--vs", metavar="TOKEN", help="Explain by how much the target's logit exceeds this token's."),
]
By = Annotated[str, typer.Option("--by", metavar="LEVEL", help="layer, head, neuron or source.")]
Raw = Annotated[bool, typer.Option("--raw", help="Explain the plain logit; subtract nothing.")]
LogProb = Annotated[
    bool,
    typer.Option("--log-prob", help="Explain the log-probability: subtract the mean logit under the own prediction."),
]


@analysis(text=True)
def logits(
    subject: Subject,
    target: Target = None,
    vs: Versus = None,
    by: By = "layer",
    raw: Raw = False,
    log_prob: LogProb = False,
    pos: Positions = "-1",
    top_k: TopK = 16,
) -> "Analysis[LogitAttribution]":
    """Which part of the model writes a logit? Direct attribution by layer, head, neuron or source token.

    By default the mean logit of the tokens that occur in the training split is subtracted; of all tokens, where the
    corpus is missing. A token is an id, a text that is one token (mind the space: ' London'), or a token as it is
    printed (·London).
    """
    from lumiere.cli.inspect.logits_view import show
    from lumiere.cli.inspect.texts import averaged_tokens
    from lumiere.interpret.logit_attribution import find_level, logit_attribution
    from lumiere.report.figures.bars import draw_logits

    level = find_level(by)
    references = {"--raw": raw, "--log-prob": log_prob, "--vs": vs is not None}
    given = [name for name, is_given in references.items() if is_given]
    if len(given) > 1:
        raise LumiereError(f"{given[0]} and {given[1]} are two references", "choose one")
    tokenizer, tokens = subject.opened.tokenizer, subject.tokens
    positions = parse_indices(pos, len(tokens), "position")
    wanted = None if target is None else parse_token(target, tokenizer)
    other = None if vs is None else parse_token(vs, tokenizer)
    if wanted is not None and wanted == other:
        raise LumiereError(f"--target and --vs are the same token, {wanted}", "there is no difference to explain")
    averaged, about = (None, "") if given else averaged_tokens(subject.opened)
    return Analysis(
        compute=lambda model: logit_attribution(
            model, tokens, positions, wanted, other, not raw, level, averaged, log_prob
        ),
        show=lambda result: show(result, subject.label, top_k, about),
        draw=lambda result: draw_logits(result, subject.label),
        about={"averaged_over": about or None},
    )
