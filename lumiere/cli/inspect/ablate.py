"""`lumiere inspect ablate`."""

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lumiere.cli.console import show_note, stdout
from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.cli.inspect.options import Heads, Layers, Positions, TopK, parse_indices
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.interpret.ablation import Ablations

BAR_WIDTH = 24
MANY = 64
"""Ablations from which on a batch has fewer sequences, so that the answer does not take minutes."""
BATCH_SIZE, SMALL_BATCH_SIZE = 32, 4

UnitName = Annotated[
    str, typer.Option("--unit", metavar="UNIT", help="What to take away: head, feedforward, layer, neuron or position.")
]
ModeName = Annotated[str, typer.Option("--mode", metavar="MODE", help="What comes in its place: mean, zero, resample.")]
Neurons = Annotated[
    Optional[str],  # noqa: UP045 (Typer reads this form)
    typer.Option("--neuron", metavar="LIST", help="Neurons, counted from 0, such as 7 or 0-31. \\[default: all]"),
]
Batches = Annotated[int, typer.Option("--batches", metavar="N", min=1, help="Batches to take the mean over.")]
BatchSize = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--batch-size",
        metavar="N",
        min=1,
        help=f"Sequences of a batch. \\[default: {BATCH_SIZE}, or {SMALL_BATCH_SIZE} for more than {MANY} ablations]",
    ),
]


@analysis(text=True)
def ablate(
    subject: Subject,
    unit: UnitName = "head",
    mode: ModeName = "mean",
    layer: Layers = None,
    head: Heads = None,
    neuron: Neurons = None,
    pos: Positions = None,
    batches: Batches = 8,
    batch_size: BatchSize = None,
    top_k: TopK = 16,
) -> "Analysis[Ablations]":
    """What is the loss without a part? Without any text, over windows of the validation split.

    Each part is taken away alone. The change of the loss is in nats a token: positive where the part was of use.
    """
    from lumiere.cli.inspect.batches import choose_batches
    from lumiere.interpret.ablation import ablate as ablate_units
    from lumiere.interpret.ablation import check_mode, find_unit
    from lumiere.report.figures.bars import draw_ablations

    kind = find_unit(unit)
    check_mode(mode)
    for option, value, wanted in (("head", head, "head"), ("neuron", neuron, "neuron"), ("pos", pos, "position")):
        if value is not None and unit != wanted:
            raise LumiereError(f"--{option} chooses a {wanted}, and the unit is {unit}", f"add --unit {wanted}")
    model = subject.opened.model
    layers = parse_indices(layer, model.num_layers, "layer")
    listed = {"head": head, "neuron": neuron, "position": pos}.get(unit)

    def chosen(num_positions: int) -> list[int]:
        return parse_indices(listed, kind.count(model, num_positions), unit)

    if batch_size is None:
        is_many = len(layers) * len(chosen(model.context_size)) > MANY
        batch_size = SMALL_BATCH_SIZE if is_many else BATCH_SIZE
    sequences, source = choose_batches(subject, batches, batch_size)
    indices = chosen(sequences[0].tokens.shape[1])
    return Analysis(
        compute=lambda model: ablate_units(model, sequences, unit, mode, layers, indices, subject.seed),
        show=lambda result: show(result, top_k),
        draw=draw_ablations,
        source=source,
    )


def show(result: "Ablations", top_k: int) -> None:
    """The strongest ablations, sorted, with a bar each."""
    from lumiere.cli.inspect.batches import counted_documents
    from lumiere.evaluation.scoring import half_width

    shown = result.order[:top_k]
    width = max(len(result.labels[number]) for number in shown)
    largest = max(abs(float(result.changes[number])) for number in shown) or 1.0
    has_errors = result.num_documents > 1
    errors = ", ± standard error" if has_errors else ""
    stdout().print(f"loss {result.loss:.4f} nats; change without a {result.unit} ({result.mode}){errors}:\n")
    for number in shown:
        change, error = float(result.changes[number]), float(result.standard_errors[number])
        spread = f" ± {error:.4f}" if has_errors else ""
        length = round(abs(change) / largest * BAR_WIDTH)
        bar = f"  [cyan]{'█' * length}[/]" if change > 0 else f"  [red]{'░' * length}[/]"
        stdout().print(f"{result.labels[number]:{width}}  {change:+8.4f}{spread}{bar if length else ''}")
    stdout().print()
    if len(shown) < len(result.order):
        show_note(f"{len(result.order) - len(shown):,} more are left out; --top-k shows more, -o FILE has all")
    if has_errors:
        reach = half_width(result.num_documents)
        units = counted_documents(result.num_documents, are_windows=bool((result.documents >= 0).all()))
        clear = int((abs(result.changes) > reach * result.standard_errors).sum())
        stdout().print(
            f"{clear:,} of {len(result.order):,} changes exceed {reach:.2f} standard errors (95 %, {units})",
            soft_wrap=False,
        )
