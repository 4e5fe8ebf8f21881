"""Heat maps: attention, logit lens, token losses and activations, and the helpers that all figures with maps share.

Magnitudes use viridis, whose lightness rises evenly, so that it can be read with color blindness and in gray (Nuñez et
al. 2018, "Optimizing colormaps with consideration for color vision deficiency"). Signed values use RdBu of ColorBrewer
(Harrower & Brewer 2003), white at zero, with symmetric limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lumiere.report.figures.figure import (
    COLORS,
    INK,
    Picture,
    add_legend,
    fitted,
    label_axes,
    new_figure,
    rank_label,
    style_axes,
    style_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from lumiere.interpret.activations import Activations
    from lumiere.interpret.attention import AttentionPatterns, CombinedAttention
    from lumiere.interpret.logit_lens import LogitLens
    from lumiere.interpret.token_losses import TokenLosses

Label = Callable[[int], str]
"""Returns a token as printable text."""

MAGNITUDES, SIGNED = "viridis", "RdBu"
POSITIVE, NEGATIVE = "#2166AC", "#B2182B"
"""Colors of signed bars: the ends of `SIGNED`."""
LARGEST_FONT, SMALLEST_FONT = 8.0, 4.5
POINTS_PER_INCH = 72
ROW = 0.21
"""Height of a labeled row in inches; the sizes below are in inches too."""
MAP_TOKEN, LARGEST_MAP, SMALLEST_MAP, WIDEST_MAPS = 0.16, 7.0, 1.6, 15.0
LENS_COLUMN, LENS_MARGIN = 1.05, 2.2
TEXT_TOKEN, WIDEST_TEXT = 0.25, 16.0
MAPS_PER_ROW = 4
"""Of attention maps that do not form a grid of layers and heads."""
MAX_LENS_ROWS = 96
"""Above this many positions, cells have no text and rows no labels."""


def heat_map(
    axes: Axes,
    values: np.ndarray,
    *,
    low: float | None = None,
    high: float | None = None,
    is_signed: bool = False,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    rotation: float = 0,
    form: str | None = None,
    fontsize: float = LARGEST_FONT,
) -> AxesImage:
    """Draw an image of (rows, columns) numbers. Cells that are not finite stay empty.

    Args:
        low, high: limits of the color scale. Default: the smallest and largest value.
        is_signed: use a scale that is symmetric about zero.
        rows, columns: labels.
        rotation: of the column labels, in degrees.
        form: format of the numbers in the cells, such as `{:.0%}`. Default: no numbers.
        fontsize: of the numbers.
    """
    finite = values[np.isfinite(values)]
    if is_signed:
        high = high or float(np.abs(finite).max(initial=0)) or 1.0
        low = -high
    low = float(finite.min(initial=0)) if low is None else low
    high = float(finite.max(initial=low)) if high is None else high
    colors = SIGNED if is_signed else MAGNITUDES
    # Without interpolation an SVG holds one pixel per cell, and the same bytes each time.
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(shown, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="none")
    style_axes(axes)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if rows is not None:
        label_rows(axes, rows)
    if columns is not None:
        label_columns(axes, columns, rotation=rotation)
    if form is not None:
        texts = [["" if np.isnan(x) else form.format(x) for x in row] for row in np.ma.filled(shown, np.nan)]
        write_cells(axes, image, texts, fontsize)
    return image


def label_rows(axes: Axes, labels: Sequence[str], fontsize: float = LARGEST_FONT) -> None:
    axes.set_yticks(range(len(labels)), list(labels), fontsize=fontsize)
    style_text(*axes.get_yticklabels())


def label_columns(axes: Axes, labels: Sequence[str], fontsize: float = LARGEST_FONT, rotation: float = 0) -> None:
    axes.set_xticks(range(len(labels)), list(labels), fontsize=fontsize, rotation=rotation)
    style_text(*axes.get_xticklabels())


def fitting_font(inches: float, count: int) -> float | None:
    """Return the font size at which `count` labels fit into a length; None if it would be unreadable."""
    size = min(LARGEST_FONT, 0.8 * inches * POINTS_PER_INCH / count)
    return size if size >= SMALLEST_FONT else None


def label_tokens(axes: Axes, labels: Sequence[str], inches: float, *, on_rows: bool, on_columns: bool) -> None:
    """Label both sides of a map with tokens, or with positions if tokens would be too small to read."""
    size = fitting_font(inches, len(labels))
    if size is None:
        axes.tick_params(labelsize=LARGEST_FONT, labelleft=on_rows, labelbottom=on_columns)
        label_axes(axes, xlabel="position" if on_columns else "", ylabel="position" if on_rows else "")
        return
    shown = [fitted(label) for label in labels]
    label_rows(axes, shown if on_rows else [], size)
    label_columns(axes, shown if on_columns else [], size, rotation=90)


def write_cells(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]], fontsize: float = LARGEST_FONT) -> None:
    """Write a text into each cell, in black or white depending on the cell's lightness."""
    values = np.ma.asarray(image.get_array())
    colors = np.asarray(image.cmap(image.norm(values)))
    empty = np.ma.getmaskarray(values)
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if not text:
                continue
            is_dark = colors[row, column, :3] @ (0.299, 0.587, 0.114) < 0.5
            written = axes.text(column, row, text, ha="center", va="center", fontsize=fontsize)
            style_text(written)
            written.set_color(INK if empty[row, column] else "white" if is_dark else "black")


def add_scale(figure: Figure, image: AxesImage, axes: Axes | Sequence[Axes], name: str) -> None:
    """Add a color bar."""
    panels = list(axes) if isinstance(axes, Sequence) else axes
    bar = figure.colorbar(image, ax=panels, label=name, shrink=0.8, aspect=30, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(colors=INK, labelsize=LARGEST_FONT)
    bar.ax.yaxis.label.set_fontsize(LARGEST_FONT)
    style_text(bar.ax.yaxis.label)


ATTENTION_KINDS = {
    "pattern": ("Attention", "softmax(q k / sqrt(d)) (Vaswani et al. 2017)"),
    "value-weighted": ("Attention weighted by value norms", "scaled by the norm of the value vector (CircuitsVis)"),
    "norm-weighted": (
        "Attention weighted by output norms",
        "scaled by the norm of the vector added to the residual stream (Kobayashi et al. 2020)",
    ),
    "mean": ("Attention, mean over heads", "averaged over the heads of a layer"),
    "max": ("Attention, maximum over heads", "the maximum over the heads of a layer"),
    "rollout": ("Attention rollout", "propagated through layers and residual connections (Abnar & Zuidema 2020)"),
}


def draw_attention(result: AttentionPatterns | CombinedAttention, label: Label) -> Picture:
    """Draw one map for each head, layers from top to bottom; for combined heads, one map for each layer."""
    from lumiere.interpret.attention import CombinedAttention

    size = len(result.tokens)
    if isinstance(result, CombinedAttention):
        names, maps, columns = [f"L{layer}" for layer in result.layers], result.weights, 1
    else:
        names = [f"L{layer}H{head}" for layer in result.layers for head in result.heads]
        maps, columns = result.patterns.reshape(-1, size, size), len(result.heads)
    columns = columns if columns > 1 else min(len(names), MAPS_PER_ROW)
    rows = -(-len(names) // columns)
    side = float(np.clip(size * MAP_TOKEN, SMALLEST_MAP, min(LARGEST_MAP, max(SMALLEST_MAP, WIDEST_MAPS / columns))))
    figure = new_figure(columns * side + 1.8, rows * (side + 0.25) + 1.6)
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    labels = [label(token) for token in result.tokens]
    is_hidden, images = ~np.tri(size, dtype=bool), []
    for number, (axes, name, weights) in enumerate(zip(panels, names, maps, strict=False)):
        images.append(heat_map(axes, np.where(is_hidden, np.nan, weights), low=0.0, high=1.0))
        axes.set_aspect("equal")
        label_axes(axes, name)
        is_lowest = number + columns >= len(names)
        label_tokens(axes, labels, side, on_rows=number % columns == 0, on_columns=is_lowest)
    for axes in panels[len(names) :]:
        axes.remove()
    add_scale(figure, images[-1], panels[: len(names)], "attention weight")
    title, kind = ATTENTION_KINDS[result.kind]
    caption = (
        f"Each row is a query token; its cells are the attention weights on itself and on earlier tokens, {kind}. "
        "Attention weights show where information is read from, not how it is used (Jain & Wallace 2019)."
    )
    return Picture(figure, title, caption)


LENSES = {
    "logit": ("Logit lens (nostalgebraist 2020)", ""),
    "tuned": ("Tuned lens (Belrose et al. 2023)", ", after an affine map that was trained for it"),
    "jacobian": ("Jacobian lens (Gurnee et al. 2026)", ", after the mean Jacobian from there to the last stage"),
}


def draw_lens(result: LogitLens, stat: str, label: Label, target: str | None, lens: str = "logit") -> Picture:
    """Draw what each stage predicts after each token, and how far it is from the model's output.

    Args:
        stat: top, probability, rank, entropy or kl.
        target: printable form of the token asked for. Default: the next token of the text.
        lens: logit, tuned or jacobian.
    """
    asked = f"of {target}" if target is not None else "of the next token"
    values, name, low, high = {
        "top": (result.top_probabilities[..., 0], "probability of the top-1 token", 0.0, 1.0),
        "probability": (result.target_probabilities, f"probability {asked}", 0.0, 1.0),
        "rank": (np.log10(1.0 + result.target_places), f"log10(1 + rank) {asked}", 0.0, None),
        "entropy": (result.entropies, "entropy (nats)", 0.0, None),
        "kl": (result.divergences, "KL(final || stage) (nats)", 0.0, None),
    }[stat]
    num_rows, num_stages = len(result.positions), len(result.stages)
    height = max(num_rows * ROW, 1.5) if num_rows <= MAX_LENS_ROWS else MAX_LENS_ROWS * ROW / 2
    figure = new_figure(max(6.0, num_stages * LENS_COLUMN + LENS_MARGIN), height + 1.7)
    axes = figure.add_subplot()
    image = heat_map(axes, values.T, low=low, high=high, columns=[stage_name(stage) for stage in result.stages])
    axes.xaxis.tick_top()
    if num_rows <= MAX_LENS_ROWS:
        label_rows(axes, [fitted(label(result.tokens[position])) for position in result.positions])
        write_cells(axes, image, lens_cells(result, stat, label))
    else:
        axes.set_ylabel("position")
        style_text(axes.yaxis.label)
    add_scale(figure, image, axes, name)
    words = "; the text is that token" if stat == "top" else ""
    title, translated = LENSES[lens]
    caption = (
        f"{title}: each column applies the final norm and the unembedding to the residual stream at that stage"
        f"{translated}. Color: {name}{words}. The last column is the model's output."
    )
    return Picture(figure, title.partition(" (")[0], caption)


def stage_name(stage: str) -> str:
    """`embed`, `L0 mid` after the attention of block 0, `L0` after block 0."""
    _, layer, point = stage.split(".")
    return {"hook_resid_pre": "embed", "hook_resid_mid": f"L{layer} mid", "hook_resid_post": f"L{layer}"}[point]


def lens_cells(result: LogitLens, stat: str, label: Label) -> list[list[str]]:
    """(P, R) texts of the cells."""
    has_target = result.target_ranks >= 0
    texts: dict[str, Callable[[tuple[int, int]], str]] = {
        "top": lambda at: fitted(label(int(result.top_tokens[at][0]))),
        "probability": lambda at: f"{result.target_probabilities[at]:.1%}" if has_target[at] else "",
        "rank": lambda at: rank_label(result.target_places[at]) if has_target[at] else "",
        "entropy": lambda at: f"{result.entropies[at]:.2f}",
        "kl": lambda at: f"{result.divergences[at]:.2f}",
    }
    stages = range(len(result.stages))
    return [[texts[stat]((stage, row)) for stage in stages] for row in range(len(result.positions))]


def draw_tokens(result: TokenLosses, label: Label) -> Picture:
    """Draw a bar for each token's loss, beside the model's entropy and the n-gram baselines."""
    count = len(result.losses)
    width = float(np.clip(count * TEXT_TOKEN, 5.0, WIDEST_TEXT))
    figure = new_figure(width + 3.0, 5.0)
    axes = figure.add_subplot()
    places = np.arange(count)
    axes.bar(places, result.losses, color=COLORS[0], width=0.8, alpha=0.8, label="loss")
    axes.plot(places, result.entropies, "-", color=COLORS[1], linewidth=1.4, label="entropy (expected loss)")
    baselines = [("unigram", result.unigram_losses, "x", INK), ("bigram", result.bigram_losses, "o", COLORS[4])]
    for name, losses, mark, color in baselines:
        if losses is not None:
            axes.plot(places, losses, mark, color=color, markersize=4, label=name)
    size = fitting_font(width, count)
    if size is None:
        label_axes(axes, xlabel="position − 1")
    else:
        label_columns(axes, [fitted(label(token)) for token in result.tokens[1:]], size, rotation=90)
    axes.set_xlim(-0.7, count - 0.3)
    label_axes(axes, ylabel="loss (nats)")
    style_axes(axes)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="y", labelsize=8)
    add_legend(axes, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    marks = "" if result.bigram_losses is None else " Marks: unigram and bigram baselines."
    caption = (
        "Surprisal of each token given the tokens before it (Shannon 1948). A bar far above the line is a surprise; "
        f"where bar and line are both high, the model was uncertain and knew it.{marks}"
    )
    return Picture(figure, "Loss of each token", caption)


def draw_activations(result: Activations, label: Label) -> Picture:
    """Draw the size of each activation at each token."""
    sizes = [rms_by_token(value, axes) for value, axes in zip(result.values.values(), result.axes, strict=True)]
    width = float(np.clip(len(result.tokens) * TEXT_TOKEN, 4.0, WIDEST_TEXT))
    figure = new_figure(width + 4.0, max(len(result.names) * 0.19, 1.0) + 2.4)
    axes = figure.add_subplot()
    with np.errstate(divide="ignore"):
        image = heat_map(axes, np.log10(np.stack(sizes)))
    label_tokens(axes, [label(token) for token in result.tokens], width, on_rows=False, on_columns=True)
    label_rows(axes, result.names, 7)
    add_scale(figure, image, axes, "log10(RMS)")
    caption = (
        "Root mean square of each activation at each token; names as in TransformerLens. A token that stands out in "
        "the residual stream (hook_resid) has massive activations (Sun et al. 2024)."
    )
    return Picture(figure, "Activations", caption)


def rms_by_token(values: np.ndarray, axes: str) -> np.ndarray:
    """(T,) root mean square over all axes but T; masked scores (−inf) are ignored."""
    place = axes.split().index("T")
    by_token = np.moveaxis(values.astype(np.float64), place, 0).reshape(values.shape[place], -1)
    finite = np.isfinite(by_token)
    return np.sqrt((np.where(finite, by_token, 0.0) ** 2).sum(1) / np.maximum(finite.sum(1), 1))
