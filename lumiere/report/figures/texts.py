"""The losses of a text's tokens, and the activations of a text, as pictures."""

from __future__ import annotations

import numpy as np

from lumiere.interpret.activations import Activations
from lumiere.interpret.token_losses import TokenLosses
from lumiere.report.figures.heat_maps import (
    Label,
    add_scale,
    fitting_font,
    heat_map,
    label_columns,
    label_tokens,
    set_title,
)
from lumiere.report.labels import fitted
from lumiere.report.pictures import COLOURS, INK, Picture, new_figure, style_axes, style_text

TOKEN, ROW = 0.25, 0.19
"""Inches."""
WIDEST = 16.0


def draw_tokens(result: TokenLosses, label: Label) -> Picture:
    """A bar a token, beside what the model expected and what models that count would have.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    count = len(result.losses)
    width = float(np.clip(count * TOKEN, 5.0, WIDEST))
    figure = new_figure(width + 3.0, 5.0)
    axes = figure.add_subplot()
    places = np.arange(count)
    axes.bar(places, result.losses, color=COLOURS[0], width=0.8, alpha=0.8, label="loss")
    axes.plot(places, result.entropies, "-", color=COLOURS[1], linewidth=1.4, label="entropy: the loss it expects")
    for name, losses, mark, colour in (
        ("unigram", result.unigram_losses, "x", INK),
        ("bigram", result.bigram_losses, "o", COLOURS[4]),
    ):
        if losses is not None:
            axes.plot(places, losses, mark, color=colour, markersize=4, label=name)
    size = fitting_font(width, count)
    if size is None:
        axes.set_xlabel("position less 1", fontsize=8)
    else:
        label_columns(axes, [fitted(label(token)) for token in result.tokens[1:]], size, rotation=90)
    axes.set_xlim(-0.7, count - 0.3)
    axes.set_ylabel("nats", fontsize=8)
    style_axes(axes)
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="y", labelsize=8)
    style_text(*axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False).get_texts())
    baselines = "" if result.bigram_losses is None else " Marks: models that count single tokens, or pairs of them."
    caption = (
        "The surprisal of each token given those before it (Shannon 1948). A bar far above the line is a surprise; "
        f"where both are high the model knew that it did not know.{baselines}"
    )
    return Picture(figure, "How well each token is predicted", caption)


def draw_activations(result: Activations, label: Label) -> Picture:
    """How large each activation is at each token.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    sizes = np.stack(
        [size_by_token(value, axes) for value, axes in zip(result.values.values(), result.axes, strict=True)]
    )
    count = len(result.tokens)
    width = float(np.clip(count * TOKEN, 4.0, WIDEST))
    figure = new_figure(width + 4.0, max(len(result.names) * ROW, 1.0) + 2.4)
    axes = figure.add_subplot()
    with np.errstate(divide="ignore"):
        image = heat_map(axes, np.log10(sizes))
    label_tokens(axes, [label(token) for token in result.tokens], width, on_rows=False, on_columns=True)
    axes.set_yticks(range(len(result.names)), result.names, fontsize=7)
    style_text(*axes.get_yticklabels())
    set_title(axes, "")
    add_scale(figure, image, axes, "log10 of the root mean square")
    caption = (
        "The root mean square of each activation at each token; names as in TransformerLens. A token that is "
        "bright in the stream (hook_resid) beside the others has massive activations (Sun et al. 2024)."
    )
    return Picture(figure, "Activations", caption)


def size_by_token(values: np.ndarray, axes: str) -> np.ndarray:
    """(T,) the root mean square over all axes but that of the tokens; what a mask made infinite is left out."""
    place = axes.split().index("T")
    moved = np.moveaxis(values.astype(np.float64), place, 0).reshape(values.shape[place], -1)
    finite = np.isfinite(moved)
    squares = np.where(finite, moved, 0.0) ** 2
    return np.sqrt(squares.sum(1) / np.maximum(finite.sum(1), 1))
