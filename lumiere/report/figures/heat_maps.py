"""Heat maps as pictures: which colour stands for what, and how tokens stand beside them, in one place.

Magnitudes are drawn in viridis, which rises evenly in lightness and can be read by colour-blind people and in grey
(Nuñez et al. 2018, "Optimizing colormaps with consideration for color vision deficiency"). Signed values are drawn from
red over white to blue (RdBu of ColorBrewer, Harrower & Brewer 2003), with white at zero and both ends equally far away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lumiere.interpret.activations import Activations
from lumiere.interpret.attention import AttentionPatterns, CombinedAttention
from lumiere.interpret.logit_lens import LogitLens
from lumiere.interpret.token_losses import TokenLosses
from lumiere.report.figures.figure import COLOURS, INK, Picture, fitted, new_figure, rank_label, style_axes, style_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


Label = Callable[[int], str]
"""A token as it is printed."""

MAGNITUDES, SIGNED = "viridis", "RdBu"
POSITIVE, NEGATIVE = "#2166AC", "#B2182B"
"""Of bars: the ends of `SIGNED`."""
LARGEST_FONT, SMALLEST_FONT = 8.0, 4.5
POINTS = 72
"""Of an inch."""


def heat_map(
    axes: Axes, values: np.ndarray, *, low: float | None = None, high: float | None = None, is_signed: bool = False
) -> AxesImage:
    """The image of (rows, columns) numbers; what is no number stays empty.

    Args:
        low, high: the ends of the scale of a magnitude (None: those of the numbers).
        is_signed: on a scale that is centred at zero.
    """
    finite = values[np.isfinite(values)]
    if is_signed:
        high = float(np.abs(finite).max(initial=0)) or 1.0
        low = -high
    low = float(finite.min(initial=0)) if low is None else low
    high = float(finite.max(initial=low)) if high is None else high
    colours = SIGNED if is_signed else MAGNITUDES
    shown = np.ma.masked_invalid(values)
    # Not resampled, so that an SVG holds a pixel a cell, and the same bytes each time.
    image = axes.imshow(shown, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
    style_axes(axes)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def label_rows(axes: Axes, labels: Sequence[str], fontsize: float = LARGEST_FONT) -> None:
    axes.set_yticks(range(len(labels)), list(labels), fontsize=fontsize)
    style_text(*axes.get_yticklabels())


def label_columns(axes: Axes, labels: Sequence[str], fontsize: float = LARGEST_FONT, rotation: float = 0) -> None:
    axes.set_xticks(range(len(labels)), list(labels), fontsize=fontsize, rotation=rotation)
    style_text(*axes.get_xticklabels())


def fitting_font(inches: float, count: int) -> float | None:
    """The size in points at which `count` labels have room on so many inches; None where they have none."""
    size = min(LARGEST_FONT, 0.8 * inches * POINTS / count)
    return size if size >= SMALLEST_FONT else None


def label_tokens(axes: Axes, labels: Sequence[str], inches: float, *, on_rows: bool, on_columns: bool) -> None:
    """The tokens on both sides of a map; their positions where they would be too small to read."""
    size = fitting_font(inches, len(labels))
    if size is None:
        axes.tick_params(labelsize=LARGEST_FONT, labelleft=on_rows, labelbottom=on_columns)
        if on_rows:
            axes.set_ylabel("position", fontsize=LARGEST_FONT)
        if on_columns:
            axes.set_xlabel("position", fontsize=LARGEST_FONT)
        style_text(axes.xaxis.label, axes.yaxis.label)
        return
    shown = [fitted(label) for label in labels]
    label_rows(axes, shown if on_rows else [], size)
    label_columns(axes, shown if on_columns else [], size, rotation=90)


def write_cells(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]], fontsize: float = LARGEST_FONT) -> None:
    """A text in each cell, in black or white, whichever is easier to read on the cell's colour."""
    values = np.ma.asarray(image.get_array())
    colours = np.asarray(image.cmap(image.norm(values)))
    empty = np.ma.getmaskarray(values)
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if text:
                dark = colours[row, column, :3] @ (0.299, 0.587, 0.114) < 0.5 and not empty[row, column]
                colour = "white" if dark else INK if empty[row, column] else "black"
                written = axes.text(column, row, text, ha="center", va="center", fontsize=fontsize)
                style_text(written)
                written.set_color(colour)


def add_scale(figure: Figure, image: AxesImage, axes: Axes | Sequence[Axes], name: str) -> None:
    """The bar that says which colour is which number."""
    panels = axes if not isinstance(axes, Sequence) else list(axes)
    bar = figure.colorbar(image, ax=panels, label=name, shrink=0.8, aspect=30, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(colors=INK, labelsize=LARGEST_FONT)
    bar.ax.yaxis.label.set_fontsize(LARGEST_FONT)
    style_text(bar.ax.yaxis.label)


def set_title(axes: Axes, text: str, fontsize: float = 9) -> None:
    style_text(axes.set_title(text, fontsize=fontsize, loc="left"))


TOKEN_SIZE = 0.16
"""Inches of a row or a column that can be read with ease."""
LARGEST_MAP, SMALLEST_MAP, WIDEST_MAPS = 7.0, 1.6, 15.0
"""Inches of a map, and of all that stand side by side."""
IN_A_ROW = 4
"""Maps, where they have no grid of layers and heads."""
KINDS = {
    "pattern": ("Attention", "by softmax(q k / sqrt(d)) (Vaswani et al. 2017)"),
    "value-weighted": ("Attention, weighted by the values' norms", "times the size of what is taken (CircuitsVis)"),
    "norm-weighted": (
        "Attention, weighted by the norms of what is written",
        "times the size of what reaches the residual stream (Kobayashi et al. 2020)",
    ),
    "mean": ("Attention, mean of the heads", "in the mean over the heads of a layer"),
    "max": ("Attention, largest of the heads", "the largest of the heads of a layer"),
    "rollout": ("Attention rollout", "followed through all layers and the residual connections (Abnar & Zuidema 2020)"),
}


def draw_attention(result: AttentionPatterns | CombinedAttention, label: Label) -> Picture:
    """A map a head, layers from top to bottom; a map a layer, where the heads are combined.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    if isinstance(result, AttentionPatterns):
        names = [f"L{layer}H{head}" for layer in result.layers for head in result.heads]
        maps, columns = result.patterns.reshape(-1, *result.patterns.shape[2:]), len(result.heads)
    else:
        names, maps, columns = [f"L{layer}" for layer in result.layers], result.weights, 1
    columns = columns if columns > 1 else min(len(names), IN_A_ROW)
    rows = -(-len(names) // columns)
    size = len(result.tokens)
    side = float(np.clip(size * TOKEN_SIZE, SMALLEST_MAP, min(LARGEST_MAP, max(SMALLEST_MAP, WIDEST_MAPS / columns))))
    figure = new_figure(columns * side + 1.8, rows * (side + 0.25) + 1.6)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    labels = [label(token) for token in result.tokens]
    images = []
    for number, (name, weights) in enumerate(zip(names, maps, strict=True)):
        images.append(heat_map(panels[number], only_earlier(weights), low=0.0, high=1.0))
        panels[number].set_aspect("equal")
        set_title(panels[number], name)
        is_lowest = number + columns >= len(names)
        label_tokens(panels[number], labels, side, on_rows=number % columns == 0, on_columns=is_lowest)
    for axes in panels[len(names) :]:
        axes.remove()
    add_scale(figure, images[-1], list(panels[: len(names)]), "share of the row")
    title, kind = KINDS[result.kind]
    caption = (
        f"Each row is a token, and its cells are the shares that it takes from the tokens before it and from itself, "
        f"{kind}: the brighter, the more. A share says where information is taken from, not what it does there (Jain & "
        "Wallace 2019)."
    )
    return Picture(figure, title, caption)


def only_earlier(weights_TS: np.ndarray) -> np.ndarray:
    """The same without what lies above the diagonal, where no token can look."""
    return np.where(np.tri(len(weights_TS), dtype=bool), weights_TS, np.nan)


LENS_ROW, LENS_COLUMN, MARGIN = 0.21, 1.05, 2.2
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
    height = max(num_rows * LENS_ROW, 1.5) if num_rows <= MOST_WRITTEN else MOST_WRITTEN * LENS_ROW / 2
    figure = new_figure(max(6.0, num_stages * LENS_COLUMN + MARGIN), height + 1.7)
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
