"""The attribution of a logit in a terminal: signed bars that add up."""

from collections.abc import Callable

import numpy as np

from lumiere.cli.console import escape, stdout
from lumiere.interpret.logit_attribution import LogitAttribution
from lumiere.report.figures.bars import named_parts

BAR_WIDTH = 36
NAME_WIDTH = 16


def show(result: LogitAttribution, label: Callable[[int], str], top_k: int, averaged_over: str) -> None:
    """For each position what is explained, the largest parts, the rest, and the sum."""
    for column, position in enumerate(result.positions):
        what, reference = "logit", ""
        if result.versus is not None:
            reference = f" less that of {label(result.versus)} ({result.versus})"
        elif result.reference == "mean":
            reference = f" less the mean of {averaged_over}"
        elif result.reference == "prediction":
            what, reference = "log-probability", f" plus the entropy {result.entropies[column]:.3f}"
        stdout().print(
            f"at position {position}, {label(result.tokens[position])}: the {what} of {label(result.targets[column])} "
            f"({result.targets[column]}){reference} is {result.logits[column]:+.3f}; its probability "
            f"{result.probabilities[column]:.1%}\n",
            soft_wrap=False,
            markup=False,
        )
        show_parts(named_parts(result, column, label), top_k)
        stdout().print()


def show_parts(parts: list[tuple[str, float]], top_k: int) -> None:
    """At most `top_k` parts, the largest, in the order in which they come, with a bar each."""
    largest = sorted(range(len(parts)), key=lambda number: -abs(parts[number][1]))[:top_k]
    scale = max((abs(added) for _, added in parts), default=0.0) or 1.0
    for number in sorted(largest):
        name, added = parts[number]
        show_line(name, added, scale)
    rest = [added for number, (_, added) in enumerate(parts) if number not in set(largest)]
    if rest:
        stdout().print(f"[dim]{f'{len(rest):,} others':{NAME_WIDTH}} {sum(rest):+9.3f}[/]")
    stdout().print(f"[bold]{'sum':{NAME_WIDTH}} {sum(added for _, added in parts):+9.3f}[/]")


def show_line(name: str, added: float, scale: float) -> None:
    length = round(abs(added) / scale * BAR_WIDTH) if np.isfinite(added) else 0
    bar = f"[cyan]{'█' * length}[/]" if added > 0 else f"[red]{'░' * length}[/]"
    stdout().print(f"{escape(name.ljust(NAME_WIDTH))} {added:+9.3f}  {bar}".rstrip())
