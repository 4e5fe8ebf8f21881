"""A circuit drawn as a graph: layers from bottom to top, an edge as wide as its effect."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lumiere.report.figures.figure import COLORS, HOVER, INK, Picture, add_legend, new_figure, style_text

if TYPE_CHECKING:
    from lumiere.interpret.circuit import Circuit

MAX_DRAWN = 80
"""Edges, those with the largest effects."""
KINDS = {"q": "queries", "k": "keys", "v": "values", "": "feed-forward part or logits"}
PORTS = {"q": -0.25, "k": 0.0, "v": 0.25, "": 0.0}
"""Where the edges into a head end, beside its center."""
NODE_WIDTH, ROW_HEIGHT, BOX = 0.95, 0.75, 0.17
"""In inches; half the height of a node, in rows."""
THIN, WIDE = 0.5, 7.0
"""Points, of an edge at the threshold and of one with the whole difference."""


def part_of(name: str) -> str:
    """Return the node of a reader: `L1H0` for `L1H0.k`, `L1G0` for the keys of a group; others are their own."""
    head, _, kind = name.rpartition(".")
    return head if kind in ("q", "k", "v") else name


def kind_of(name: str) -> str:
    """Return q, k or v; an empty text for other readers."""
    kind = name.rpartition(".")[2]
    return kind if kind in ("q", "k", "v") else ""


def row_of(node: str) -> float:
    """Return the height of a node before empty rows are left out."""
    if node in ("embed", "pos"):
        return -1
    if node == "logits":
        return float("inf")
    match = re.match(r"L(\d+)", node)
    assert match is not None
    return 2 * int(match[1]) + node.endswith(".mlp")


def bend_of(middle: float, counts: list[int]) -> float:
    """Return how far the control points of an edge lie beside it, so that it passes between the nodes on its way.

    Args:
        middle: Halfway between its ends.
        counts: Of the nodes in each row that it passes; they are 1 apart, around 0.
    """
    if not counts or (len(counts) == 1 and abs(middle) >= counts[0] / 2):
        return 0.0
    first_gap = counts[len(counts) // 2] / 2 % 1
    gap = round(middle - first_gap) + first_gap
    if len(counts) > 1:  # outwards, the farther the longer the edge
        gap = middle + (0.5 + 0.25 * (len(counts) - 2)) * (1 if middle >= 0 else -1)
    return (gap - middle) / 0.75  # a cubic curve goes three quarters of the way to its control points


def draw_circuit(result: Circuit) -> Picture:
    """Draw the edges of the circuit."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path

    drawn = [int(edge) for edge in result.order if result.in_circuit[edge]][:MAX_DRAWN]
    ends = [(result.sources[edge], part_of(result.targets[edge])) for edge in drawn]
    nodes = dict.fromkeys([*result.writers, *(part_of(reader) for reader in result.readers)])
    used = [node for node in nodes if any(node in pair for pair in ends)]
    heights = {height: row for row, height in enumerate(sorted({row_of(node) for node in used}))}
    rows: dict[int, list[str]] = {row: [] for row in heights.values()}
    for node in used:
        rows[heights[row_of(node)]].append(node)
    widest = max((len(row) for row in rows.values()), default=1)
    places = {
        node: (column - (len(names) - 1) / 2, row) for row, names in rows.items() for column, node in enumerate(names)
    }
    figure = new_figure(max(6.5, widest * NODE_WIDTH + 1), max(3.0, len(rows) * ROW_HEIGHT + 2))
    axes = figure.subplots()
    colors = dict(zip(KINDS, COLORS, strict=False))
    for edge, (source, target) in reversed(list(zip(drawn, ends, strict=True))):
        share, kind = float(result.shares[edge]), kind_of(result.targets[edge])
        (x, y), (to_x, to_y) = places[source], places[target]
        start, end = (x, y + BOX), (to_x + PORTS[kind], to_y - BOX)
        bend = bend_of((x + to_x) / 2, [len(rows[row]) for row in range(y + 1, to_y)])
        middle = (end[1] - start[1]) / 2
        path = Path([start, (x + bend, start[1] + middle), (end[0] + bend, end[1] - middle), end], [1, 4, 4, 4])
        line = PathPatch(
            path,
            facecolor="none",
            edgecolor=colors[kind],
            linewidth=THIN + (WIDE - THIN) * min(1.0, abs(share)),
            linestyle="-" if share > 0 else "--",
            alpha=0.75,
            zorder=1,
        )
        line.set_gid(f"{HOVER}{result.names[edge]}: {share:+.1%} ({result.effects[edge]:+.4g})")
        axes.add_patch(line)
    for node, (x, y) in places.items():
        box = FancyBboxPatch(
            (x - 0.36, y - BOX), 0.72, 2 * BOX, boxstyle="round,pad=0,rounding_size=0.08", facecolor="white",
            edgecolor=INK, linewidth=0.8, zorder=2,
        )  # fmt: skip
        axes.add_patch(box)
        text = axes.text(x, y, node, ha="center", va="center", fontsize=8, zorder=3)
        text.set_parse_math(False)
    kinds = [kind for kind in KINDS if any(kind_of(result.targets[edge]) == kind for edge in drawn)]
    handles = [Line2D([], [], color=colors[kind], linewidth=2.5, label=f"into {KINDS[kind]}") for kind in kinds]
    if any(result.shares[edge] < 0 for edge in drawn):
        handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1.5, label="works against it"))
    axes.set_xlim(-widest / 2 - 0.6, widest / 2 + 0.6)
    axes.set_ylim(-0.6, max(len(rows), 1) - 0.3)
    axes.axis("off")
    if handles:
        add_legend(axes, handles=handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)
    if not drawn:
        style_text(axes.text(0, 0, "no edge is above the threshold", ha="center", fontsize=9))
    size = int(result.in_circuit.sum())
    cut = "" if len(drawn) == size else f", the {len(drawn)} strongest of {size:,}"
    how = "their effect when cut alone" if result.method == "exact" else f"their effect as {result.method} estimates it"
    caption = (
        f"Edges that carry at least {result.threshold:.1%} of the difference in {result.metric} between clean and "
        f"corrupt prompts{cut}, as wide as {how} (a cut edge carries: {result.ablation}). "
        f"Alone, the circuit does {result.faithful:.0%} of it (faithfulness)."
    )
    return Picture(figure, "Circuit", caption)
