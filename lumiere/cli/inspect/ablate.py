"""`lumiere inspect ablate`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.cli.console import show_note, stdout
from lumiere.cli.inspect.command import (
    Analysis,
    Heads,
    Layers,
    NumBatches,
    Positions,
    TopK,
    analysis,
    show_wrapped,
    signed_bar,
)
from lumiere.cli.inspect.inputs import InspectTarget, counted_documents, parse_indices
from lumiere.errors import LumiereError, check_choice

if TYPE_CHECKING:
    from lumiere.interpret.ablation import Ablations

BAR_WIDTH = 24
MANY = 64
"""The number of ablations above which a batch is smaller, so that the command does not take minutes."""
BATCH_SIZE, SMALL_BATCH_SIZE = 32, 4

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


@analysis(text=True)
def ablate(
    target: InspectTarget,
    unit: UnitName = "head",
    mode: ModeName = "mean",
    layer: Layers = None,
    head: Heads = None,
    neuron: Neurons = None,
    pos: Positions = None,
    batches: NumBatches = 8,
    batch_size: BatchSize = None,
    top_k: TopK = 16,
) -> "Analysis[Ablations]":
    """What is the loss without a part? Without a text option, over windows of the validation split.

    Each part is ablated alone. The change of the loss is in nats per token: positive if the part was of use.
    """
    from lumiere.interpret.ablation import MODES, find_unit
    from lumiere.interpret.ablation import ablate as ablate_units
    from lumiere.report.figures.bars import draw_ablations

    kind = find_unit(unit)
    check_choice("mode", mode, MODES)
    lists = {"head": ("head", head), "neuron": ("neuron", neuron), "position": ("pos", pos)}
    for wanted, (option, value) in lists.items():
        if value is not None and unit != wanted:
            raise LumiereError(f"--{option} needs --unit {wanted}, and the unit is {unit}", f"add --unit {wanted}")
    model = target.opened.model
    layers = target.layers(layer)
    _, listed = lists.get(unit, (unit, None))

    def chosen(num_positions: int) -> list[int]:
        return parse_indices(listed, kind.count(model, num_positions), unit)

    if batch_size is None:
        is_many = len(layers) * len(chosen(model.context_size)) > MANY
        batch_size = SMALL_BATCH_SIZE if is_many else BATCH_SIZE
    sequences, source = target.batches(batches, batch_size)
    indices = chosen(sequences[0].tokens.shape[1])
    return Analysis(
        compute=lambda model: ablate_units(model, sequences, unit, mode, layers, indices, target.seed),
        show=lambda result: show_ablations(result, top_k),
        draw=draw_ablations,
        source=source,
    )


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
