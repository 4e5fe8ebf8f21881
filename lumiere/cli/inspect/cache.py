"""`lumiere inspect cache`."""

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lumiere.cli.console import size, stdout
from lumiere.cli.inspect.analysis import Analysis, Subject, analysis

if TYPE_CHECKING:
    from lumiere.interpret.activations import Activations

Names = Annotated[
    Optional[list[str]],  # noqa: UP045 (Typer reads this form)
    typer.Option(
        "--names",
        metavar="GLOB",
        help="Only these, such as 'blocks.*.attn.hook_pattern'. Repeatable. \\[default: all]",
    ),
]


@analysis(text=True)
def cache(subject: Subject, names: Names = None) -> "Analysis[Activations]":
    """Which activations are there? Lists their names and shapes; -o FILE.npz saves them.

    The names are those of TransformerLens. A .json or .csv file has the list, without the numbers.
    """
    from lumiere.interpret.activations import activations, matching_names
    from lumiere.report.figures.heat_maps import draw_activations

    patterns = names or ["*"]
    matching_names(subject.opened.model, patterns)
    tokens = subject.tokens
    return Analysis(
        compute=lambda model: activations(model, tokens, patterns),
        show=show,
        draw=lambda result: draw_activations(result, subject.label),
    )


def show(result: "Activations") -> None:
    width = max(map(len, result.names))
    for row in result.rows():
        shape = " x ".join(row["shape"].split())
        stdout().print(f"{row['name']:{width}}  {row['axes']:5}  {shape:>13}  {size(row['num_bytes']):>8}")
    stdout().print(f"\n{len(result.names):,} activations, {size(sum(result.num_bytes))}")
