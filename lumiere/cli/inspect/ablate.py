"""`lumiere inspect ablate`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.causes import BATCH_SIZE, MANY, SMALL_BATCH_SIZE
from lumiere.api.inspection import Inspect
from lumiere.api.target import counted_documents
from lumiere.cli.console import show_note, stdout
from lumiere.cli.inspect.command import (
    Heads,
    Layers,
    NumBatches,
    Positions,
    TopK,
    analysis,
    show_wrapped,
    signed_bar,
)

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.interpret.ablation import Ablations
    from lumiere.interpret.joint_ablation import JointAblations

BAR_WIDTH = 24

UnitName = Annotated[
    str, Option("--unit", metavar="UNIT", help="What to ablate: head, feedforward, layer, neuron or position.")
]
ModeName = Annotated[str, Option("--mode", metavar="MODE", help="Replacement: mean, zero or resample.")]
Neurons = Annotated[str | None, Option(metavar="LIST", help="Neurons, from 0, such as 7 or 0-31. \\[default: all]")]
BatchSize = Annotated[
    int | None,
    Option(
        metavar="N",
        min=1,
        help=f"Sequences in a batch. \\[default: {BATCH_SIZE}; {SMALL_BATCH_SIZE} for more than {MANY} ablations]",
    ),
]


Together = Annotated[
    str | None,
    Option(
        metavar="SETS",
        help="Ablate several parts at once: L0H1+L1H2,L0F+L1N7 (heads, feed-forward parts, neurons), or pairs: all "
        "pairs of heads.",
    ),
]


@analysis(
    Inspect.ablate,
    unit=UnitName,
    mode=ModeName,
    layer=Layers,
    head=Heads,
    neuron=Neurons,
    pos=Positions,
    together=Together,
    batches=NumBatches,
    batch_size=BatchSize,
)
def ablate(found: "Analysis[Ablations | JointAblations]", top_k: TopK = 16) -> None:
    """What is the loss without a part? Without a text option, over windows of the validation split.

    Each part is ablated alone, or with --together several at once. The
    change of the loss is in nats per token: positive if the part was of use.
    """
    from lumiere.interpret.joint_ablation import JointAblations

    if isinstance(found.result, JointAblations):
        show_joint_ablations(found.result, top_k)
    else:
        show_ablations(found.result, top_k)


def show_joint_ablations(result: "JointAblations", top_k: int) -> None:
    """Print the sets with the largest interactions, beside the changes of their parts."""
    has_errors = result.num_documents > 1
    singles = dict(zip(result.parts, result.changes, strict=True))
    width = max(len(name) for name in (*result.sets, "parts"))
    stdout().print(f"loss {result.loss:.4f} nats; change without parts ({result.mode}):\n")
    errors = "   ± s.e." if has_errors else ""
    stdout().print(f"[bold]{'parts':{width}}  together  {'sum':>8}  interaction{errors}[/]")
    for number in result.order[:top_k]:
        name, joint, interaction = result.sets[number], result.joint[number], result.interactions[number]
        total = sum(singles[part] for part in name.split("+"))
        spread = f"  {result.interaction_errors[number]:.4f}" if has_errors else ""
        stdout().print(f"{name:{width}}  {joint:+8.4f}  {total:+8.4f}     {interaction:+8.4f}{spread}")
    stdout().print()
    if len(result.sets) > top_k:
        show_note(f"{len(result.sets) - top_k:,} more: --top-k shows more, -o FILE saves all")
    show_wrapped("[dim]interaction above 0: they stand in for each other; below 0: they need each other[/]")


def show_ablations(result: "Ablations", top_k: int) -> None:
    """Print the ablations with the largest changes, each with a bar."""
    from lumiere.evaluation.scoring import half_width

    shown = result.order[:top_k]
    width = max(len(result.labels[number]) for number in shown)
    largest = max(abs(float(result.changes[number])) for number in shown) or 1.0
    has_errors = result.num_documents > 1
    errors = ", ± standard error" if has_errors else ""
    stdout().print(f"loss {result.loss:.4f} nats; change without a {result.unit} ({result.mode}){errors}:\n")
    for number in shown:
        change = float(result.changes[number])
        spread = f" ± {result.standard_errors[number]:.4f}" if has_errors else ""
        bar = signed_bar(change, largest, BAR_WIDTH)
        stdout().print(f"{result.labels[number]:{width}}  {change:+8.4f}{spread}{bar and f'  {bar}'}")
    stdout().print()
    if len(shown) < len(result.order):
        show_note(f"{len(result.order) - len(shown):,} more: --top-k shows more, -o FILE saves all")
    if has_errors:
        reach = half_width(result.num_documents)
        units = counted_documents(result.num_documents, are_windows=bool((result.documents >= 0).all()))
        clear = int((abs(result.changes) > reach * result.standard_errors).sum())
        show_wrapped(f"{clear:,} of {len(result.order):,} changes exceed {reach:.2f} standard errors (95 %, {units})")
