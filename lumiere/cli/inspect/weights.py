"""`lumiere inspect weights`."""

from itertools import product
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import escape, show_note, stdout
from lumiere.cli.inspect.command import Heads, Layers, TopK, analysis, show_wrapped

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.interpret.head_weights import HeadWeights

MAX_HEADS = 8
"""Heads that are printed where none are chosen; -o FILE has all."""
WIDTH = 80
NAMES = {"q": "Q", "k": "K", "v": "V"}

Directions = Annotated[int, Option(metavar="N", min=1, help="Singular directions with tokens.")]


@analysis(Inspect.weights, layer=Layers, head=Heads, directions=Directions, top_k=TopK)
def weights(
    found: "Analysis[HeadWeights]",
    pairs: Annotated[int, Option("--pairs", metavar="N", min=1, help="Pairs of heads printed for each kind.")] = 4,
) -> None:
    """What do the weights of each head connect? OV and QK circuits, composition between heads; no text is needed.

    Composition is between 0 and 1; beside it is what random matrices of the same shapes score. Singular values joined
    by ≈ are nearly equal: their directions span a subspace, and each alone, with its tokens, is arbitrary.
    """
    show_composition(found.result, pairs)
    show_circuits(found)


def show_composition(result: "HeadWeights", count: int) -> None:
    """Print the strongest pairs of each kind beside chance."""
    if not len(result.pairs):
        return
    stdout().print("[bold]composition   earlier   later    score   x chance[/]")
    for number, kind in enumerate(result.kinds):
        scores = result.scores[:, number]
        order = [pair for pair in (-scores).argsort(kind="stable")[:count] if scores[pair] == scores[pair]]
        for pair in order:
            layer, head, later_layer, later_head = result.pairs[pair].tolist()
            names = f"{f'L{layer}H{head}':9} {f'L{later_layer}H{later_head}':7}"
            above = scores[pair] > result.random_highs[number]
            line = f"{NAMES[kind]:13} {names} {scores[pair]:6.3f} {scores[pair] / result.chance:10.1f}"
            stdout().print(f"[bold]{line}[/]" if above else line)
    highs = ", ".join(f"{NAMES[kind]} {high:.3f}" for kind, high in zip(result.kinds, result.random_highs, strict=True))
    show_wrapped(
        f"[dim]chance {result.chance:.3f}; largest of 100 random pairs of these shapes: {highs} (bold: above it)[/]\n"
    )


def show_circuits(found: "Analysis[HeadWeights]") -> None:
    """Print the singular values of each head's circuits, and the tokens of their first directions."""
    from lumiere.interpret.head_weights import NO_TOKEN, SIDES

    result, label = found.result, found.target.label
    places = list(product(range(len(result.layers)), range(len(result.heads))))
    for row, h in places[:MAX_HEADS]:
        name = f"L{result.layers[row]}H{result.heads[h]}"
        for c, circuit in enumerate(result.circuits):
            norm, rank = result.norms[row, h, c], result.effective_ranks[row, h, c]
            heading = f"{name} {circuit.upper()}"
            facts = f"  norm {norm:.2f}, effective rank {rank:.1f}; singular values"
            values = values_line(result, row, h, c, WIDTH - len(heading + facts))
            stdout().print(f"[bold]{heading}[/]{facts}{values}")
            for d in range(result.tokens.shape[3]):
                if result.tokens[row, h, c, d, 0, 0] == NO_TOKEN:
                    continue
                group = result.groups[row, h, c]
                size = int((group == group[d]).sum())
                for side, sided in enumerate(SIDES[circuit]):
                    tokens = [label(token) for token in result.tokens[row, h, c, d, side] if token != NO_TOKEN]
                    mark = f" [yellow](one of {size} nearly equal)[/]" if size > 1 and side == 0 else ""
                    number = f"{d + 1}" if side == 0 else ""
                    stdout().print(fitting(f"  {number:2} {sided:7}", tokens, len(mark) and 26) + mark)
        sizes = result.constant_norms[row, h]
        if sizes.any():
            parts = ", ".join(f"{part} {size:.2f}" for part, size in zip(result.constants, sizes, strict=True))
            stdout().print(f"  [dim]biases, apart from the circuits: {parts}[/]")
    stdout().print()
    if len(places) > MAX_HEADS:
        show_note(f"{len(places) - MAX_HEADS:,} more heads: --layer and --head choose some, -o FILE saves all")
    show_wrapped(
        "[dim]reads: tokens whose embedding points most along the direction. writes: tokens whose logit it raises "
        "most. query, key: embeddings that match. From "
        f"{escape(found.provenance['averaged_over'])}[/]\n"
    )


def values_line(result: "HeadWeights", layer: int, head: int, circuit: int, room: int) -> str:
    """Return the first singular values, as many as fit, with ≈ between those of a group."""
    values, groups = (part[layer, head, circuit] for part in (result.singular_values, result.groups))
    line = ""
    for number in range(len(values)):
        joint = "≈" if number and groups[number] == groups[number - 1] else " "
        text = f"{joint}{values[number]:.2f}"
        if values[number] != values[number] or len(line + text) > room:
            break
        line += text
    return line


def fitting(start: str, tokens: list[str], reserved: int) -> str:
    """Return as many tokens as fit a line of 80 columns after its start."""
    line = start
    for token in tokens:
        if len(line) + len(token) + 1 > WIDTH - reserved:
            break
        line += f" {token}"
    return escape(line)
