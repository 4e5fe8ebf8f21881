"""`lumiere inspect cache`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.cli.console import size, stdout
from lumiere.cli.inspect.command import Analysis, analysis
from lumiere.cli.inspect.inputs import InspectTarget

if TYPE_CHECKING:
    from lumiere.interpret.activations import Activations

Names = Annotated[
    list[str] | None,
    Option(metavar="GLOB", help="Activations, such as 'blocks.*.attn.hook_pattern'. Repeatable. \\[default: all]"),
]


@analysis(text=True)
def cache(target: InspectTarget, names: Names = None) -> "Analysis[Activations]":
    """Which activations are there? Lists their names and shapes; -o FILE.npz saves them.

    The names are those of TransformerLens. A .json or .csv file contains the list without the values.
    """
    from lumiere.interpret.activations import activations, matching_names
    from lumiere.report.figures.heat_maps import draw_activations

    patterns = names or ["*"]
    matching_names(target.opened.model, patterns)
    return Analysis(
        compute=lambda model: activations(model, target.tokens, patterns),
        show=show_activations,
        draw=lambda result: draw_activations(result, target.label),
    )


def show_activations(result: "Activations") -> None:
    width = max(map(len, result.names))
    for row in result.rows():
        shape = " x ".join(row["shape"].split())
        stdout().print(f"{row['name']:{width}}  {row['axes']:5}  {shape:>13}  {size(row['num_bytes']):>8}")
    stdout().print(f"\n{len(result.names):,} activations, {size(sum(result.num_bytes))}")
