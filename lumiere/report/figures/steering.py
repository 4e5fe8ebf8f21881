"""Dose-response curves of steering."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lumiere.report.figures.figure import COLORS, INK, Picture, add_legend, label_axes, new_figure, style_axes

if TYPE_CHECKING:
    from lumiere.interpret.steering import Steering

CAPTION = (
    "Left: mean change of the metric over the prompts; the band is from the smallest to the largest effect of random "
    "directions of the same norm. Right: loss on other text. Doses are in units of the stream's mean norm."
)


def draw_steering(result: Steering) -> Picture:
    """Draw the effect and the loss by dose."""
    has_losses = bool(np.isfinite(result.losses).all())
    figure = new_figure(9.5 if has_losses else 5.5, 4)
    effect, *rest = np.atleast_1d(figure.subplots(1, 2 if has_losses else 1))
    for number, kind in enumerate(dict.fromkeys(result.placebo_kinds)):
        rows_RD = result.placebo_effects[np.array(result.placebo_kinds) == kind]
        color = COLORS[(number + 1) % len(COLORS)]
        effect.fill_between(result.doses, rows_RD.min(0), rows_RD.max(0), color=color, alpha=0.18, linewidth=0)
        effect.plot(result.doses, rows_RD.mean(0), color=color, linestyle="--", linewidth=1, label=f"{kind} directions")
    effect.plot(result.doses, result.means, color=COLORS[0], marker="o", markersize=4, linewidth=1.8, label="direction")
    if np.isfinite(result.low).all():
        effect.fill_between(result.doses, result.low, result.high, color=COLORS[0], alpha=0.25, linewidth=0)
    effect.axhline(0, color=INK, linewidth=0.6)
    for axes in rest:
        axes.plot(
            result.doses, result.placebo_losses, color=COLORS[1], linestyle="--", linewidth=1, label="random directions"
        )
        axes.plot(
            result.doses, result.losses, color=COLORS[0], marker="o", markersize=4, linewidth=1.8, label="direction"
        )
        label_axes(axes, "cost", "dose", "loss on other text (nats/token)")
        style_axes(axes)
        add_legend(axes, fontsize=8)
    label_axes(effect, f"after block {result.layer}: {result.method}", "dose", f"change of the {result.metric}")
    style_axes(effect)
    add_legend(effect, fontsize=8)
    return Picture(figure, "Steering", CAPTION)
