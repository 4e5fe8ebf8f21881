"""`lumiere inspect attention`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lumiere.cli.console import color_support, show_note, stdout
from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.cli.inspect.options import Heads, Layers, parse_indices
from lumiere.errors import LumiereError, nearest

if TYPE_CHECKING:
    import numpy as np

    from lumiere.interpret.attention import AttentionPatterns, CombinedAttention

KINDS = ("pattern", "value-weighted", "norm-weighted", "mean", "max", "rollout")
"""Those of `lumiere.interpret.attention`, whose import would load torch."""

Kind = Annotated[str, typer.Option("--kind", metavar="KIND", help=f"What the weights are: {', '.join(KINDS)}.")]

WHOLE_MAPS = 2
"""So many heat maps are drawn whole; of more there is a table, with thumbnails for up to `THUMBNAILS` of them."""
THUMBNAILS = 8


@analysis(text=True)
def attention(
    subject: Subject, layer: Layers = None, head: Heads = None, kind: Kind = "pattern"
) -> "Analysis[AttentionPatterns] | Analysis[CombinedAttention]":
    """Where does each head look? A line a head; one head's whole map with --layer and --head.

    In a map, rows are tokens and columns the tokens that they take information from. --kind value-weighted and
    norm-weighted count what is taken by its size, mean and max put the heads of a layer together, rollout follows the
    attention through all layers.
    """
    if kind not in KINDS:
        guess = nearest(kind, KINDS)
        raise LumiereError(
            f"there is no kind {kind!r}", f"did you mean {guess}?" if guess else f"the kinds are {', '.join(KINDS)}"
        )
    shape = subject.opened.config.model
    layers = parse_indices(layer, shape.num_layers, "layer")
    heads = parse_indices(head, shape.num_heads, "head")
    tokens, labels = subject.tokens, subject.labels
    from lumiere.interpret.attention import WEIGHTED, attention_patterns, combined_attention
    from lumiere.report.figures.heat_maps import draw_attention

    if kind in WEIGHTED:
        return Analysis(
            compute=lambda model: attention_patterns(model, tokens, layers, heads, kind),
            show=lambda result: show_heads(result, labels),
            draw=lambda result: draw_attention(result, subject.label),
        )
    return Analysis(
        compute=lambda model: combined_attention(model, tokens, layers, heads, kind),
        show=lambda result: show_layers(result, labels),
        draw=lambda result: draw_attention(result, subject.label),
    )


def show_heads(result: "AttentionPatterns", labels: list[str]) -> None:
    """A table of all heads, and as much of their maps as fits a screen."""
    from lumiere.cli.terminal_plots import show_legend

    places = [(row, column) for row in range(len(result.layers)) for column in range(len(result.heads))]
    show_table(result)
    if len(places) <= WHOLE_MAPS:
        for row, column in places:
            title = head_name(result, row, column) + ("" if result.kind == "pattern" else f", {result.kind}")
            show_map(result.patterns[row, column], labels, title)
        show_legend("share of a row")
        return
    if len(places) <= THUMBNAILS and len(labels) > 1 and color_support() != "none":
        show_thumbnails(result, places)
        show_legend("largest share in a cell")
    stdout().print("[dim]--layer L --head H draws the whole map of a head[/]")


def head_name(result: "AttentionPatterns", row: int, column: int) -> str:
    return f"L{result.layers[row]}H{result.heads[column]}"


def show_table(result: "AttentionPatterns") -> None:
    """One line a head. What a uniform head would have stands below, to read the others against."""
    import numpy as np

    from lumiere.interpret.attention import statistics

    size = len(result.tokens)
    if size == 1:
        stdout().print("one token, which looks at itself")
        return
    stdout().print("[bold]head     entropy  distance  first  previous  itself[/]")

    def line(name: str, entropy: float, distance: float, *shares: float) -> str:
        first, previous, current = (f"{share:.0%}" for share in shares)
        return f"{name:8} {entropy:7.2f}  {distance:8.1f}  {first:>5}  {previous:>8}  {current:>6}"

    columns = ("normalized_entropy", "mean_distance", "first", "previous", "current")
    for row, column in np.ndindex(len(result.layers), len(result.heads)):
        stdout().print(line(head_name(result, row, column), *(getattr(result, name)[row, column] for name in columns)))
    uniform = statistics(np.tri(size) / np.arange(1, size + 1)[:, None])
    stdout().print(f"[dim]{line('uniform', *(float(uniform[name]) for name in columns))}[/]")
    stdout().print("[dim]means over all tokens but the first; entropy: 0 is one token, 1 all alike[/]\n")


def show_thumbnails(result: "AttentionPatterns", places: list[tuple[int, int]]) -> None:
    """Small maps side by side, as many as the terminal is wide."""
    from lumiere.cli.terminal_plots import THUMBNAIL_WIDTH, color_thumbnail, thumbnail

    draw = color_thumbnail if color_support() == "many" else thumbnail
    room = max(1, (stdout().width + 2) // (THUMBNAIL_WIDTH + 2))
    for first in range(0, len(places), room):
        group = places[first : first + room]
        names = (head_name(result, *place).ljust(THUMBNAIL_WIDTH + 2) for place in group)
        stdout().print(f"[bold]{''.join(names).rstrip()}[/]")
        for parts in zip(*(draw(result.patterns[place]) for place in group), strict=True):
            for number, part in enumerate(parts):
                stdout().print("  " * (number > 0), part, sep="", end="")
            stdout().print()
        stdout().print()


def show_layers(result: "CombinedAttention", labels: list[str]) -> None:
    """A line a layer, and the map of the last one."""
    from lumiere.cli.terminal_plots import show_legend

    for row, layer in enumerate(result.layers):
        title = f"L{layer}, {result.kind}"
        if row == len(result.layers) - 1:
            show_map(result.weights[row], labels, title)
        else:
            show_title(result.weights[row], title)
    show_legend(f"{'largest share' if result.kind == 'max' else 'share'} of a row")


def show_title(weights: "np.ndarray", name: str) -> None:
    """A line that says what is striking."""
    first_token, previous, current = weights[1:, 0], weights.diagonal(-1), weights.diagonal()[1:]
    shares = {"first token": first_token, "previous token": previous, "itself": current}
    summary = ", ".join(f"{name} {share.mean():.0%}" for name, share in shares.items()) if len(weights) > 1 else ""
    stdout().print(f"[bold]{name}[/]  {summary}")


def show_map(weights: "np.ndarray", labels: list[str], name: str) -> None:
    """A heat map under its title; of a text that is too long for the terminal, its end; in a pipe, its numbers."""
    from lumiere.cli.terminal_plots import color_map, heatmap, room
    from lumiere.report.figures.figure import LABEL_WIDTH

    size, width = len(labels), stdout().width
    show_title(weights, name)
    if color_support() == "none":
        show_numbers(weights, labels)
        return
    draw, most = (color_map, room(width)) if color_support() == "many" else (heatmap, max(1, width - LABEL_WIDTH - 1))
    shown = min(size, most)
    if shown < size:
        show_note(f"the terminal has room for the last {shown} of {size} tokens")
    stdout().print(draw(weights[size - shown :, size - shown :], labels[size - shown :], width))


def show_numbers(weights: "np.ndarray", labels: list[str]) -> None:
    """The map as a table with tabs, without what lies above the diagonal."""
    lines = [["", *labels]]
    for row, label in enumerate(labels):
        lines.append([label, *(f"{weight:.3f}" for weight in weights[row, : row + 1])])
    # Not through Rich, which makes spaces of tabs.
    sys.stdout.write("".join("\t".join(line) + "\n" for line in lines))
