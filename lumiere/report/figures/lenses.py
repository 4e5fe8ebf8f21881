"""The figure that compares lenses: how far each is from the model's prediction at every stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumiere.report.figures.figure import (
    COLORS,
    LINE_STYLES,
    Picture,
    add_legend,
    label_axes,
    new_figure,
    style_axes,
)
from lumiere.report.figures.heat_maps import label_columns, stage_name

if TYPE_CHECKING:
    from lumiere.interpret.lenses import LensComparison


def draw_lenses(result: LensComparison) -> Picture:
    """Draw the divergence, the agreement and the rank of each lens along the stages."""
    figure = new_figure(12.0, 3.6)
    drawn = (
        (result.divergences, "divergence", "KL(final || lens) (nats)"),
        (result.agreements, "agreement", "share of equal top tokens"),
        (result.ranks + 1, "rank of the model's top token, from 1", "mean rank"),
    )
    names = [stage_name(stage) for stage in result.stages]
    for axes, (values, title, unit) in zip(figure.subplots(1, 3), drawn, strict=True):
        for number, (lens, curve) in enumerate(zip(result.lenses, values, strict=True)):
            style = LINE_STYLES[number % len(LINE_STYLES)]
            axes.plot(range(len(names)), curve, style, color=COLORS[number % len(COLORS)], marker="o", label=lens)
        label_axes(axes, title, ylabel=unit)
        style_axes(axes)
        axes.tick_params(labelsize=8)
        label_columns(axes, names, rotation=90 if len(names) > 8 else 0)
        if values is drawn[2][0]:
            axes.set_yscale("log")
            add_legend(axes, fontsize=8)
        else:
            axes.set_ylim(bottom=0)
    caption = (
        f"How lenses read {result.num_tokens:,} held-out tokens at each stage: the logit lens (nostalgebraist 2020), "
        "and fitted ones: tuned (Belrose et al. 2023), its offsets alone, Jacobian (Gurnee et al. 2026). At the last "
        "stage each is the model's own prediction."
    )
    return Picture(figure, "Lenses compared", caption)
