"""`lumiere inspect logits`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.command import Positions, TopK, analysis, show_wrapped, signed_bar

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.api.target import InspectTarget
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


@analysis(Inspect.logits, target=Target, vs=Versus, by=By, raw=Raw, log_prob=LogProb, pos=Positions)
def logits(found: "Analysis[LogitAttribution]", top_k: TopK = 16) -> None:
    """Which part of the model writes a logit? Direct attribution by layer, head, neuron or source token.

    By default, the mean logit of the tokens that occur in the training split is subtracted; of all tokens, if the
    corpus is missing. A token is an id, a text that is one token (note the space: ' London'), or a token as it is
    printed (·London).
    """
    show_attribution(found.result, found.target, top_k, found.provenance["averaged_over"])


def show_attribution(
    result: "LogitAttribution", target: "InspectTarget", top_k: int, averaged_over: str | None
) -> None:
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
