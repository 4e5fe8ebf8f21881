"""`lumiere inspect cache`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import size, stdout
from lumiere.cli.inspect.command import analysis

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.interpret.activations import Activations

Names = Annotated[
    list[str] | None,
    Option(metavar="GLOB", help="Activations, such as 'blocks.*.attn.hook_pattern'. Repeatable. \\[default: all]"),
]


@analysis(Inspect.cache, names=Names)
def cache(found: "Analysis[Activations]") -> None:
    """Which activations are there? Lists their names and shapes; -o FILE.npz saves them.

    The names are those of TransformerLens. A .json or .csv file contains the list without the values.
    """
    show_activations(found.result)


def show_activations(result: "Activations") -> None:
    width = max(map(len, result.names))
    for row in result.rows():
        shape = " x ".join(row["shape"].split())
        stdout().print(f"{row['name']:{width}}  {row['axes']:5}  {shape:>13}  {size(row['num_bytes']):>8}")
    stdout().print(f"\n{len(result.names):,} activations, {size(sum(result.num_bytes))}")
