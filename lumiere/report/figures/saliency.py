"""The figure of saliency: one signed bar a token for each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lumiere.report.figures.bars import signed_colors
from lumiere.report.figures.figure import INK, Picture, fitted, label_axes, new_figure, style_axes
from lumiere.report.figures.heat_maps import TEXT_TOKEN, WIDEST_TEXT, Label, fitting_font, label_columns

if TYPE_CHECKING:
    from lumiere.interpret.saliency import Saliency


def draw_saliency(result: Saliency, label: Label) -> Picture:
    """Draw what each token up to the explained position contributes, a panel a method."""
    count = result.position + 1
    width = float(np.clip(count * TEXT_TOKEN, 5.0, WIDEST_TEXT))
    figure = new_figure(width + 1.0, 7.0)
    panels = figure.subplots(4, 1, sharex=True)
    drawn = {
        f"integrated gradients (baseline {result.baseline})": result.integrated_gradients,
        f"integrated gradients (baseline {result.other_baseline})": result.other_integrated_gradients,
        f"occlusion (baseline {result.baseline})": result.occlusion,
        "gradient × input": result.gradient_x_input,
    }
    for axes, (name, values) in zip(panels, drawn.items(), strict=True):
        axes.bar(range(count), values[:count], width=0.8, color=signed_colors(values[:count]))
        axes.axhline(0, color=INK, linewidth=0.8)
        label_axes(axes, name, ylabel="nats" if result.versus is None else "logits")
        style_axes(axes)
        axes.grid(visible=False, axis="x")
        axes.tick_params(labelsize=8)
    size = fitting_font(width, count)
    if size is None:
        label_axes(panels[-1], xlabel="position")
    else:
        label_columns(panels[-1], [fitted(label(token)) for token in result.tokens[:count]], size, rotation=90)
    panels[-1].set_xlim(-0.7, count - 0.3)
    caption = (
        f"What each token contributes to {score_name(result, label)} after position {result.position}: "
        f"{result.score:+.2f}, and {result.baseline_score:+.2f} where every embedding is the baseline. Integrated "
        "gradients (Sundararajan et al. 2017) sum to the difference. Blue raises it, red lowers it; scales differ."
    )
    return Picture(figure, "Saliency of tokens", caption)


def score_name(result: Saliency, label: Label) -> str:
    """What is explained, in words."""
    target = fitted(label(result.target))
    if result.versus is None:
        return f"the log-probability of {target}"
    return f"the logit of {target} minus that of {fitted(label(result.versus))}"
