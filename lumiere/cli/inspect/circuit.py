"""`lumiere inspect circuit`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import show_note, stdout
from lumiere.cli.inspect.command import CONTRAST_OPTIONS, MetricName, TopK, analysis, show_wrapped, signed_bar

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.interpret.circuit import Circuit

BAR_WIDTH = 24
COLUMN = 7

AblationName = Annotated[
    str,
    Option("--ablation", metavar="NAME", help="What a cut edge carries: corrupt, mean-per-position, mean or zero."),
]
MethodName = Annotated[
    str, Option("--by", metavar="METHOD", help="exact: cut each edge; eap or eap-ig: estimate all from gradients.")
]
Threshold = Annotated[
    float, Option(metavar="SHARE", min=0, help="Share of the difference from which an edge is in the circuit.")
]
MaxEdges = Annotated[int, Option(metavar="N", min=1, help="Most edges that are cut one by one.")]
Read = Annotated[int, Option("--read", metavar="POS", help="Position whose prediction is measured; -1 is the last.")]


@analysis(
    Inspect.circuit,
    **CONTRAST_OPTIONS,
    metric=MetricName,
    ablation=AblationName,
    by=MethodName,
    threshold=Threshold,
    max_edges=MaxEdges,
    read=Read,
)
def circuit(found: "Analysis[Circuit]", top_k: TopK = 16) -> None:
    """Which edges between parts does a behavior need? Each edge is cut alone.

    An edge leads from what a part writes to the queries, keys or values of a head, to a feed-forward part, or to the
    logits. A cut edge carries what the part wrote on the corrupt prompt. Effects are in percent of the difference
    between the prompts.
    """
    show_edges(found.result, top_k)
    show_faithfulness(found.result)
    show_methods(found.result)


def percent(share: float, digits: int = 1) -> str:
    """Return a share in percent, and never -0."""
    return f"{round(100 * share, digits) + 0.0:.{digits}f}"


def show_edges(result: "Circuit", top_k: int) -> None:
    """Print what is compared, and the edges with the largest effects, each with a bar."""
    import numpy as np

    num_edges, num_found = len(result.effects), int(result.in_circuit.sum())
    show_wrapped(
        f"{result.metric}: clean {result.clean:.3f}, corrupt {result.corrupt:.3f}, all edges cut {result.empty:.3f}"
    )
    how = "change it when cut alone" if result.method == "exact" else f"should change it, by {result.method}"
    show_wrapped(
        f"{num_found:,} of {num_edges:,} edges {how} by at least {result.threshold:.1%} of the difference "
        f"(a cut edge carries: {result.ablation}). Percent of the difference:\n"
    )
    shown = result.order[:top_k]
    width = max(len(result.names[edge]) for edge in shown)
    largest = max(abs(float(result.shares[edge])) for edge in shown) or 1.0
    has_intervals = bool(np.isfinite(result.low).any())
    for edge in shown:
        interval = f" {100 * result.low[edge]:+6.1f} to {100 * result.high[edge]:+6.1f}" if has_intervals else ""
        bar = signed_bar(float(result.shares[edge]), largest, BAR_WIDTH)
        stdout().print(f"{result.names[edge]:{width}} {100 * result.shares[edge]:+7.1f}{interval}{bar and f'  {bar}'}")
    stdout().print()
    if len(shown) < num_edges:
        show_note(f"{num_edges - len(shown):,} more: --top-k shows more, -o FILE saves all")
    if has_intervals:
        show_wrapped(f"intervals: 95 %, bootstrap of {result.num_groups:,} groups of prompts, each edge alone")
    else:
        stdout().print("[dim]fewer than 8 groups of prompts: no intervals[/]")


def show_faithfulness(result: "Circuit") -> None:
    """Print what the circuit does alone, and the curve against the number of edges."""
    import numpy as np

    size = int(result.in_circuit.sum())
    stdout().print(f"\n[bold]faithfulness[/] [dim](all other edges cut, {result.ablation}; all edges 100 %)[/]")
    lines = {
        f"the circuit of {size:,} edges": result.faithful,
        "all edges but these": result.complement,
        f"{len(result.random)} random circuits of that size": float(result.random.mean()),
    }
    if result.num_subsets:
        lines[f"incompleteness, {result.num_subsets:,} subsets"] = result.incomplete
    for label, value in lines.items():
        stdout().print(f"{label:34}{percent(value):>7}%")
    if result.num_subsets:
        needed = int((result.needed[np.isfinite(result.needed)] >= result.threshold).sum())
        stdout().print(f"{'edges that it needs':34}{f'{needed} of {size}':>8}")
    for name, values in (
        ("edges", [f"{count:,}" for count in result.curve_sizes]),
        ("percent", [percent(height, 0) for height in result.curve]),
    ):
        stdout().print(f"[dim]{name:9}[/]{''.join(value.rjust(COLUMN) for value in values)}")


def show_methods(result: "Circuit") -> None:
    """Print the cheaper methods against the cuts."""
    if result.method != "exact":
        return
    stdout().print(f"\n{'[bold]against the cuts[/]':42}{'edges':>8}{'precision':>11}{'recall':>8}{'rank':>7}")
    for row, name in enumerate(result.approximations):
        rank = result.correlations[row]
        correlation = f"{rank:7.2f}" if rank == rank else f"{'':7}"
        stdout().print(
            f"{name:29}{result.sizes[row]:8,}{result.precisions[row]:11.2f}{result.recalls[row]:8.2f}{correlation}"
        )
    show_wrapped(
        f"[dim]rank: Spearman's correlation of the effects without sign. EAP-IG: the edges of the embedding add up to "
        f"{result.integrated_total:.1%} of the difference.[/]\n"
    )
