"""`lumiere inspect saliency`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.attributions import BASELINES, QUADRATURES
from lumiere.api.inspection import Inspect
from lumiere.cli.console import color_support, escape, stdout
from lumiere.cli.inspect.command import analysis, show_wrapped, signed_bar

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.api.target import InspectTarget
    from lumiere.interpret.saliency import Saliency

BAR_WIDTH = 15
POSITIVE, NEGATIVE = (33, 102, 172), (178, 24, 43)
"""Colors of pictures, blue and red."""

Target = Annotated[
    str | None, Option("--target", metavar="TOKEN", help="Token to explain. \\[default: the most probable]")
]
Versus = Annotated[
    str | None,
    Option(metavar="TOKEN", help="Subtract the logit of this token. \\[default: the most probable other one]"),
]
LogProb = Annotated[bool, Option("--log-prob", help="Explain the log-probability instead of a logit difference.")]
Position = Annotated[int, Option(metavar="N", help="Position whose prediction is explained; -1 is the last.")]
Baseline = Annotated[
    str, Option(metavar="NAME", help=f"What replaces an embedding: {', '.join(BASELINES[:-1])} or {BASELINES[-1]}.")
]
Quadrature = Annotated[str, Option(metavar="RULE", help=f"Rule of the integral: {' or '.join(QUADRATURES)}.")]
Steps = Annotated[int, Option(metavar="N", min=1, help="Points of the integral at first; they double up to 256.")]


@analysis(
    Inspect.saliency,
    target=Target,
    vs=Versus,
    log_prob=LogProb,
    pos=Position,
    baseline=Baseline,
    quadrature=Quadrature,
    steps=Steps,
)
def saliency(found: "Analysis[Saliency]") -> None:
    """Which tokens does a prediction depend on? Integrated gradients, gradient times input and occlusion.

    The baseline 'mean' is the mean embedding over the tokens of the training split; start, padding and end are special
    tokens. A second baseline is computed too, to see how much the answer depends on it.
    """
    show_saliency(found.result, found.target, found.provenance["averaged_over"])


def show_saliency(result: "Saliency", target: "InspectTarget", averaged_over: str | None) -> None:
    """Print what is explained, the text in color, one line a token, and how far the methods agree."""
    from lumiere.report.figures.figure import LABEL_WIDTH, fitted
    from lumiere.report.figures.saliency import score_name

    label = target.label
    show_wrapped(
        f"{score_name(result, label)} after position {result.position}, "
        f"{label(result.tokens[result.position])}: {result.score:+.3f}; with every embedding at the baseline "
        f"({result.baseline}): {result.baseline_score:+.3f}\n",
        markup=False,
    )
    if color_support() == "many":
        show_colored(result, target)
    largest = largest_of_text(result, target)
    headings = f"{'token':>{LABEL_WIDTH + 4}}{'IG ' + result.baseline:>11}{'IG ' + result.other_baseline:>11}"
    stdout().print(f"[bold]{headings}{'occlusion':>11}{'grad x input':>14}[/]")
    columns = (
        (result.integrated_gradients, 11),
        (result.other_integrated_gradients, 11),
        (result.occlusion, 11),
        (result.gradient_x_input, 14),
    )
    for place in range(result.position + 1):
        token, value = result.tokens[place], float(result.integrated_gradients[place])
        numbers = "".join(f"{values[place]:>+{width}.3f}" for values, width in columns)
        bar = "[dim]special[/]" if token in special_ids(target) else signed_bar(value, largest, BAR_WIDTH)
        stdout().print(f"{place:>3} {escape(fitted(label(token)).rjust(LABEL_WIDTH))}{numbers}  {bar}".rstrip())
    sums = "".join(f"{values.sum():>+{width}.3f}" for values, width in columns)
    stdout().print(f"[bold]{'sum':>{LABEL_WIDTH + 4}}{sums}[/]\n")
    show_wrapped(
        f"IG: integrated gradients, {result.num_steps} points ({result.quadrature}), completeness error "
        f"{result.completeness_error:+.1e} ({result.relative_error:.2%} of the change)",
        markup=False,
    )
    names = f"{result.baseline} and {result.other_baseline}"
    show_wrapped(f"rank correlation of the baselines {names}: {result.rank_correlation:+.2f}", markup=False)
    if averaged_over:
        show_wrapped(f"mean: that of the embeddings of {averaged_over}", markup=False)
    stdout().print()


def show_colored(result: "Saliency", target: "InspectTarget") -> None:
    """Print the text with each token's background in blue or red, as strong as its integrated gradient."""
    from rich.text import Text

    line, largest = Text(), largest_of_text(result, target)
    for place in range(result.position + 1):
        token, value = result.tokens[place], float(result.integrated_gradients[place])
        strength = 0.0 if token in special_ids(target) else min(1.0, abs(value) / largest)
        ends = POSITIVE if value > 0 else NEGATIVE
        red, green, blue = (round(255 + strength * (end - 255)) for end in ends)
        style = f"{'white' if strength > 0.5 else 'black'} on rgb({red},{green},{blue})"
        line.append(target.label(token).replace("·", " "), style=style)
    stdout().print(line, soft_wrap=False)
    stdout().print()


def special_ids(target: "InspectTarget") -> frozenset[int]:
    return target.opened.tokenizer.special_ids


def largest_of_text(result: "Saliency", target: "InspectTarget") -> float:
    """Return the largest attribution but for special tokens: a start token's often is, and would hide all others."""
    values = zip(result.integrated_gradients.tolist(), result.tokens, strict=True)
    return max((abs(value) for value, token in values if token not in special_ids(target)), default=0.0) or 1.0
