"""The attribution of a logit in a terminal: signed bars that add up."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lumiere.cli.console import escape, out
from lumiere.cli.heatmap import fitted
from lumiere.interpret.logits import LogitAttribution

BAR_WIDTH = 36
NAME_WIDTH = 16


def show(result: LogitAttribution, label: Callable[[int], str], top_k: int) -> None:
    """For each position what is explained, the largest parts, the rest, and the sum."""
    for column, position in enumerate(result.positions):
        target, reference = label(result.targets[column]), ""
        if result.versus is not None:
            reference = f" less that of {label(result.versus)} ({result.versus})"
        elif result.reference == "mean":
            reference = " less the mean of all"
        out().print(
            f"at position {position}, {label(result.tokens[position])}: the logit of {target} "
            f"({result.targets[column]}){reference} is {result.logits[column]:+.3f}; its probability "
            f"{result.probabilities[column]:.1%}\n",
            soft_wrap=False,
            markup=False,
        )
        show_parts(by_source(result, column, label) if result.by == "source" else by_part(result, column), top_k)
        out().print()


def by_part(result: LogitAttribution, column: int) -> list[tuple[str, float]]:
    """The parts by name; the finer levels have many, and so the largest come first."""
    parts = [(part_name(part), float(added_P[column])) for part, added_P in result.parts(result.by)]
    return parts if result.by == "layer" else sorted(parts, key=lambda part: -abs(part[1]))


def part_name(part: Mapping[str, Any]) -> str:
    match part:
        case {"part": "head", "layer": layer, "head": head}:
            return f"L{layer}H{head}"
        case {"part": "neuron", "layer": layer, "neuron": neuron}:
            return f"L{layer}N{neuron}"
        case {"part": "feedforward", "layer": layer}:
            return f"L{layer} feed-forward"
        case {"part": "attention", "layer": layer}:
            return f"L{layer} attention"
        case {"part": "pos_embed"}:
            return "position"
        case _:
            return "embed"


def by_source(result: LogitAttribution, column: int, label: Callable[[int], str]) -> list[tuple[str, float]]:
    """What all heads together take from each token of the text, and what is written at the position itself."""
    sources_HS = result.sources[column].reshape(-1, len(result.tokens))
    taken_S = sources_HS.sum(axis=0)[: result.positions[column] + 1]
    parts = [
        (f"{source:3} {fitted(label(result.tokens[source]))}", float(taken_S[source])) for source in range(len(taken_S))
    ]
    own = [
        (part_name(part), float(added_P[column])) for part, added_P in result.parts("source") if part["part"] != "head"
    ]
    return parts + own


def show_parts(parts: list[tuple[str, float]], top_k: int) -> None:
    """At most `top_k` parts, the largest, in the order in which they come, with a bar each."""
    largest = sorted(range(len(parts)), key=lambda number: -abs(parts[number][1]))[:top_k]
    scale = max((abs(added) for _, added in parts), default=0.0) or 1.0
    for number in sorted(largest):
        name, added = parts[number]
        show_line(name, added, scale)
    rest = [added for number, (_, added) in enumerate(parts) if number not in set(largest)]
    if rest:
        out().print(f"[dim]{f'{len(rest):,} others':{NAME_WIDTH}} {sum(rest):+9.3f}[/]")
    out().print(f"[bold]{'sum':{NAME_WIDTH}} {sum(added for _, added in parts):+9.3f}[/]")


def show_line(name: str, added: float, scale: float) -> None:
    length = round(abs(added) / scale * BAR_WIDTH) if np.isfinite(added) else 0
    bar = f"[cyan]{'█' * length}[/]" if added > 0 else f"[red]{'░' * length}[/]"
    out().print(f"{escape(name.ljust(NAME_WIDTH))} {added:+9.3f}  {bar}".rstrip())
