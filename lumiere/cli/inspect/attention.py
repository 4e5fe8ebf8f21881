"""`lumiere inspect attention`."""

import sys
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import KINDS, Inspect
from lumiere.cli.console import color_support, show_note, stdout
from lumiere.cli.inspect.command import Heads, Layers, analysis

if TYPE_CHECKING:
    import numpy as np

    from lumiere.api.analysis import Analysis
    from lumiere.interpret.attention import AttentionPatterns, CombinedAttention

MAX_WHOLE_MAPS, MAX_THUMBNAILS = 2, 8
"""Up to this many heads are drawn as whole maps, or as thumbnails; of more there is a table only."""

Kind = Annotated[str, Option("--kind", metavar="KIND", help=f"What the weights are: {', '.join(KINDS)}.")]


@analysis(Inspect.attention, layer=Layers, head=Heads, kind=Kind)
def attention(found: "Analysis[AttentionPatterns | CombinedAttention]") -> None:
    """What does each head attend to? One line per head; --layer and --head draw a head's whole map.

    In a map, rows are destination tokens and columns source tokens. value-weighted and norm-weighted scale each weight
    by the size of what is read, mean and max combine the heads of a layer, rollout follows attention through all
    layers.
    """
    from lumiere.interpret.attention import AttentionPatterns

    if isinstance(found.result, AttentionPatterns):
        show_heads(found.result, found.target.labels)
    else:
        show_layers(found.result, found.target.labels)


def show_heads(result: "AttentionPatterns", labels: list[str]) -> None:
    """Print a table of all heads and as many of their maps as fit a screen."""
    from lumiere.cli.terminal_plots import show_legend

    maps = {
        f"L{layer}H{head}": result.patterns[row, column]
        for row, layer in enumerate(result.layers)
        for column, head in enumerate(result.heads)
    }
    show_table(result, list(maps))
    if len(maps) <= MAX_WHOLE_MAPS:
        for name, weights in maps.items():
            show_map(weights, labels, name + ("" if result.kind == "pattern" else f", {result.kind}"))
        show_legend("share of a row")
        return
    if len(maps) <= MAX_THUMBNAILS and len(labels) > 1 and color_support() != "none":
        show_thumbnails(maps)
        show_legend("largest share in a cell")
    stdout().print("[dim]--layer L --head H draws the whole map of a head[/]")


def show_table(result: "AttentionPatterns", names: list[str]) -> None:
    """Print one line per head, and below it the values of uniform attention for comparison."""
    import numpy as np

    from lumiere.interpret.attention import statistics

    size = len(result.tokens)
    if size == 1:
        stdout().print("one token, which attends to itself")
        return
    stdout().print("[bold]head     entropy  distance  first  previous  itself[/]")
    columns = ("normalized_entropy", "mean_distance", "first", "previous", "current")
    values = np.stack([getattr(result, column).ravel() for column in columns], axis=1).tolist()
    uniform = statistics(np.tri(size) / np.arange(1, size + 1)[:, None])
    for name, (entropy, distance, *shares) in [
        *zip(names, values, strict=True),
        ("uniform", [float(uniform[column]) for column in columns]),
    ]:
        first, previous, current = (f"{share:.0%}" for share in shares)
        line = f"{name:8} {entropy:7.2f}  {distance:8.1f}  {first:>5}  {previous:>8}  {current:>6}"
        stdout().print(f"[dim]{line}[/]" if name == "uniform" else line)
    stdout().print("[dim]means without the first token; entropy: 0 for one source, 1 for uniform[/]\n")


def show_thumbnails(maps: "dict[str, np.ndarray]") -> None:
    """Print small maps side by side, as many as the terminal is wide."""
    from lumiere.cli.terminal_plots import THUMBNAIL_WIDTH, thumbnail

    in_color = color_support() == "many"
    room = max(1, (stdout().width + 2) // (THUMBNAIL_WIDTH + 2))
    names = list(maps)
    for first in range(0, len(names), room):
        group = names[first : first + room]
        stdout().print(f"[bold]{''.join(name.ljust(THUMBNAIL_WIDTH + 2) for name in group).rstrip()}[/]")
        for parts in zip(*(thumbnail(maps[name], in_color) for name in group), strict=True):
            for number, part in enumerate(parts):
                stdout().print("  " * (number > 0), part, sep="", end="")
            stdout().print()
        stdout().print()


def show_layers(result: "CombinedAttention", labels: list[str]) -> None:
    """Print one line per layer, and the map of the last one."""
    from lumiere.cli.terminal_plots import show_legend

    for layer, weights in zip(result.layers, result.weights, strict=True):
        show = show_map if layer == result.layers[-1] else show_title
        show(weights, labels, f"L{layer}, {result.kind}")
    show_legend(f"{'largest share' if result.kind == 'max' else 'share'} of a row")


def show_title(weights: "np.ndarray", labels: list[str], name: str) -> None:
    """Print the name of a map and where most of its weight is."""
    first_token, previous, current = weights[1:, 0], weights.diagonal(-1), weights.diagonal()[1:]
    shares = {"first token": first_token, "previous token": previous, "itself": current}
    summary = ", ".join(f"{name} {share.mean():.0%}" for name, share in shares.items()) if len(labels) > 1 else ""
    stdout().print(f"[bold]{name}[/]  {summary}")


def show_map(weights: "np.ndarray", labels: list[str], name: str) -> None:
    """Print a heat map: the end of a text that is too long for the terminal; in a pipe, numbers."""
    from lumiere.cli.terminal_plots import heatmap, room

    size, width = len(labels), stdout().width
    show_title(weights, labels, name)
    if color_support() == "none":
        # Not through Rich, which makes spaces of tabs. Weights above the diagonal are zero.
        lines = [["", *labels]]
        lines += [
            [label, *(f"{weight:.3f}" for weight in row[: n + 1])]
            for n, (label, row) in enumerate(zip(labels, weights, strict=True))
        ]
        sys.stdout.write("".join("\t".join(line) + "\n" for line in lines))
        return
    in_color = color_support() == "many"
    most = room(width, in_color)
    first = max(0, size - most)
    if first:
        show_note(f"the terminal has room for the last {most} of {size} tokens")
    stdout().print(heatmap(weights[first:, first:], labels[first:], width, in_color))
