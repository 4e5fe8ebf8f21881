"""The logit lens as a picture: tokens by stages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lumiere.interpret.logit_lens import LogitLens
from lumiere.report.figures.heat_maps import (
    LARGEST_FONT,
    Label,
    add_scale,
    heat_map,
    label_columns,
    label_rows,
    set_title,
    write_cells,
)
from lumiere.report.labels import fitted, rank_label
from lumiere.report.pictures import Picture, new_figure, style_text

ROW, COLUMN, MARGIN = 0.21, 1.05, 2.2
"""Inches."""
MOST_WRITTEN = 96
"""Rows of a map whose cells hold words; in a longer one they would be too small."""


def draw_lens(result: LogitLens, stat: str, label: Label, target: str | None) -> Picture:
    """What each stage would say after each token, and by how much it is not yet the model's answer.

    Args:
        stat: top, probability, rank, entropy or kl.
        target: the token that is asked for, as it is printed; None: the next of the text.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    asked = f"of {target}" if target is not None else "of the next token"
    values, name, low, high = {
        "top": (result.top_probabilities[..., 0], "probability of the top token", 0.0, 1.0),
        "probability": (result.target_probabilities, f"probability {asked}", 0.0, 1.0),
        "rank": (np.log10(1.0 + result.target_places), f"log10(1 + rank) {asked}", 0.0, None),
        "entropy": (result.entropies, "entropy (nats)", 0.0, None),
        "kl": (result.divergences, "KL(final || stage) (nats)", 0.0, None),
    }[stat]
    num_rows, num_stages = len(result.positions), len(result.stages)
    height = max(num_rows * ROW, 1.5) if num_rows <= MOST_WRITTEN else MOST_WRITTEN * ROW / 2
    figure = new_figure(max(6.0, num_stages * COLUMN + MARGIN), height + 1.7)
    axes = figure.add_subplot()
    image = heat_map(axes, values.T, low=low, high=high)
    label_columns(axes, [stage_name(stage) for stage in result.stages])
    axes.xaxis.tick_top()
    if num_rows <= MOST_WRITTEN:
        label_rows(axes, [fitted(label(result.tokens[position])) for position in result.positions])
        write_cells(axes, image, cells(result, stat, label), LARGEST_FONT)
    else:
        axes.set_ylabel("position")
        style_text(axes.yaxis.label)
    set_title(axes, "", 4)
    add_scale(figure, image, axes, name)
    words = ", and in words that token" if stat == "top" else ""
    caption = (
        f"The logit lens (nostalgebraist 2020): each column reads the residual stream after a part of the model as if "
        f"it were the last one. Colour: {name}{words}; the last column is the model's own answer."
    )
    return Picture(figure, "Logit lens", caption)


def stage_name(stage: str) -> str:
    """`embed`, `L0 mid` after the attention of block 0, `L0` after the whole of it."""
    _, layer, point = stage.split(".")
    return {"hook_resid_pre": "embed", "hook_resid_mid": f"L{layer} mid", "hook_resid_post": f"L{layer}"}[point]


def cells(result: LogitLens, stat: str, label: Label) -> Sequence[Sequence[str]]:
    """(P, R) what is written in each cell."""

    def text(stage: int, row: int) -> str:
        match stat:
            case "top":
                return fitted(label(int(result.top_tokens[stage, row, 0])))
            case "probability" | "rank" if result.target_ranks[stage, row] < 0:
                return ""
            case "probability":
                return f"{result.target_probabilities[stage, row]:.1%}"
            case "rank":
                return rank_label(result.target_places[stage, row])
            case "entropy":
                return f"{result.entropies[stage, row]:.2f}"
            case _:
                return f"{result.divergences[stage, row]:.2f}"

    return [[text(stage, row) for stage in range(len(result.stages))] for row in range(len(result.positions))]
