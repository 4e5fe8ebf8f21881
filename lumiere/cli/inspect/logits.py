"""`lumiere inspect logits`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.command import Analysis, Positions, TopK, analysis, show_wrapped, signed_bar
from lumiere.cli.inspect.inputs import InspectTarget, parse_token
from lumiere.errors import LumiereError, check_choice

if TYPE_CHECKING:
    from lumiere.interpret.logit_attribution import LogitAttribution

BAR_WIDTH, NAME_WIDTH = 36, 16

Target = Annotated[
    str | None, Option("--target", metavar="TOKEN", help="Token to explain. \\[default: the most probable]")
]
Versus = Annotated[
    str | None, Option(metavar="TOKEN", help="Explain the target's logit minus the logit of this token.")
]
By = Annotated[str, Option(metavar="LEVEL", help="layer, head, neuron or source.")]
Raw = Annotated[bool, Option("--raw", help="Explain the logit itself; subtract nothing.")]
LogProb = Annotated[
    bool, Option("--log-prob", help="Explain the log-probability: subtract the mean logit under the prediction.")
]


@analysis(text=True)
def logits(
    target: InspectTarget,
    token: Target = None,
    vs: Versus = None,
    by: By = "layer",
    raw: Raw = False,
    log_prob: LogProb = False,
    pos: Positions = "-1",
    top_k: TopK = 16,
) -> "Analysis[LogitAttribution]":
    """Which part of the model writes a logit? Direct attribution by layer, head, neuron or source token.

    By default, the mean logit of the tokens that occur in the training split is subtracted; of all tokens, if the
    corpus is missing. A token is an id, a text that is one token (note the space: ' London'), or a token as it is
    printed (·London).
    """
    from lumiere.interpret.logit_attribution import LEVELS, logit_attribution
    from lumiere.report.figures.bars import draw_logits

    check_choice("level", by, LEVELS)
    references = {"--raw": raw, "--log-prob": log_prob, "--vs": vs is not None}
    given = [name for name, is_given in references.items() if is_given]
    if len(given) > 1:
        raise LumiereError(f"{given[0]} and {given[1]} are two references", "choose one")
    opened, tokens = target.opened, target.tokens
    positions = target.positions(pos)
    wanted, other = (None if name is None else parse_token(name, opened.tokenizer) for name in (token, vs))
    if wanted is not None and wanted == other:
        raise LumiereError(f"--target and --vs are the same token, {wanted}", "choose two different tokens")
    averaged, averaged_over = (None, None) if given else (target.occurring_tokens, target.averaged_over)
    return Analysis(
        compute=lambda model: logit_attribution(
            model, tokens, positions, wanted, other, not raw, by, averaged, log_prob
        ),
        show=lambda result: show_attribution(result, target, top_k, averaged_over),
        draw=lambda result: draw_logits(result, target.label),
        provenance={"averaged_over": averaged_over},
    )


def show_attribution(result: "LogitAttribution", target: InspectTarget, top_k: int, averaged_over: str | None) -> None:
    """Print for each position what is explained, the largest parts with a bar each, the rest, and the sum."""
    from lumiere.report.figures.bars import largest_parts, named_parts

    label = target.label
    for column, position in enumerate(result.positions):
        what, reference = "logit", ""
        if result.versus is not None:
            reference = f" minus that of {label(result.versus)} ({result.versus})"
        elif result.reference == "mean":
            reference = f" minus the mean of {averaged_over}"
        elif result.reference == "prediction":
            what, reference = "log-probability", f" plus the entropy {result.entropies[column]:.3f}"
        show_wrapped(
            f"at position {position}, {label(result.tokens[position])}: the {what} of {label(result.targets[column])} "
            f"({result.targets[column]}){reference} is {result.logits[column]:+.3f}; its probability "
            f"{result.probabilities[column]:.1%}\n",
            markup=False,
        )
        parts = named_parts(result, column, label)
        largest, others = largest_parts(parts, top_k)
        scale = max(abs(added) for _, added in largest) or 1.0
        for name, added in largest:
            bar = signed_bar(added, scale, BAR_WIDTH)
            stdout().print(f"{escape(name.ljust(NAME_WIDTH))} {added:+9.3f}  {bar}".rstrip())
        for name, added in others:
            stdout().print(f"[dim]{name:{NAME_WIDTH}} {added:+9.3f}[/]")
        stdout().print(f"[bold]{'sum':{NAME_WIDTH}} {sum(added for _, added in parts):+9.3f}[/]\n")
