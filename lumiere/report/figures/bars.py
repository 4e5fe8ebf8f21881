"""Scores of heads, and what it costs the model to be without a part, as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lumiere.interpret.ablation import Ablations
from lumiere.interpret.head_scores import HeadScores
from lumiere.interpret.logit_attribution import LogitAttribution
from lumiere.interpret.model_diff import HeadMatches, ModelDiff, PredictionDiff, WeightChanges, stream_names
from lumiere.interpret.summary import ModelSummary
from lumiere.report.figures.figure import COLOURS, INK, Picture, fitted, new_figure, style_axes, style_text
from lumiere.report.figures.heat_maps import (
    NEGATIVE,
    POSITIVE,
    Label,
    add_scale,
    fitting_font,
    heat_map,
    label_columns,
    label_rows,
    set_title,
    write_cells,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ROW = 0.21
"""Inches of a line."""
MOST_UNITS_WRITTEN = 16
"""Units of a layer whose cells hold their numbers."""
MOST_BARS = 16


def draw_heads(result: HeadScores) -> Picture:
    """What each head looks at, whether it copies, and the loss along the text.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    names = [f"L{layer}H{head}" for layer in result.layers for head in result.heads]
    scores = result.scores.reshape(len(names), -1)
    height = max(len(names) * ROW, 2.5)
    figure = new_figure(12.5, height + 2.2)
    score_axes, copying_axes, loss_axes = figure.subplots(1, 3, width_ratios=(5, 1, 5))
    image = heat_map(score_axes, scores, low=0.0, high=1.0)
    label_rows(score_axes, names)
    label_columns(
        score_axes,
        result.score_names,
    )
    write_cells(score_axes, image, [["" if np.isnan(value) else f"{value:.0%}" for value in row] for row in scores])
    set_title(score_axes, "share of the attention")
    baseline = ", ".join(
        f"{name} {value:.0%}"
        for name, value in zip(result.score_names, result.uniform, strict=True)
        if np.isfinite(value)
    )
    score_axes.set_xlabel(f"a uniform head has: {baseline}", fontsize=8)
    style_text(score_axes.xaxis.label)
    add_scale(figure, image, score_axes, "share")
    copying = result.copying.reshape(-1, 1)
    image = heat_map(copying_axes, copying, is_signed=True)
    image.set_clim(-1.0, 1.0)
    write_cells(copying_axes, image, [["" if np.isnan(value) else f"{value:+.2f}" for value in row] for row in copying])
    label_columns(copying_axes, [""])
    label_rows(copying_axes, [])
    set_title(copying_axes, "copying")
    draw_position_losses(loss_axes, result)
    caption = (
        "Left: the share of its attention that each head gives to exactly these tokens (prefix matching and others, "
        "Olsson et al. 2022); middle: whether it copies what it sees (blue) or suppresses it (red), from the weights "
        "(Elhage et al. 2021). Right: the loss along the sequences, which falls where heads find what came before."
    )
    return Picture(figure, "What each head is for", caption)


def draw_position_losses(axes: Axes, result: HeadScores) -> None:
    """The loss at each position; of two copies the second is drawn over the first."""
    places = np.arange(1, len(result.losses) + 1)
    if np.isnan(result.repeat_gap):
        axes.plot(places, result.losses, color=COLOURS[0], linewidth=1.4)
    else:
        length = len(result.losses) // 2
        axes.plot(places[:length], result.losses[:length], color=COLOURS[0], label="first copy")
        axes.plot(places[:length], result.losses[length : 2 * length], "--", color=COLOURS[1], label="second copy")
        style_text(*axes.legend(fontsize=8, frameon=False).get_texts())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("token", fontsize=8)
    axes.set_ylabel("loss (nats)", fontsize=8)
    axes.tick_params(labelsize=8)
    style_axes(axes)
    set_title(axes, "mean loss along the sequences")


def draw_ablations(result: Ablations) -> Picture:
    """The change of the loss without each part: all of them as a signed map, the strongest as bars.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    layers = list(dict.fromkeys(result.layers.tolist()))
    changes_LU = result.changes.reshape(len(layers), -1)
    num_units = changes_LU.shape[1]
    num_bars = min(MOST_BARS, len(result.order))
    figure = new_figure(11.0, max(len(layers) * 0.45, num_bars * ROW, 1.8) + 2.0)
    map_axes, bar_axes = figure.subplots(1, 2, width_ratios=(3, 2) if num_units > 1 else (1, 3))
    image = heat_map(map_axes, changes_LU, is_signed=True)
    label_rows(map_axes, [f"L{layer}" for layer in layers])
    if num_units <= MOST_UNITS_WRITTEN:
        size = fitting_font(6.0 / num_units, 1) or 6.0
        write_cells(map_axes, image, [[f"{change:+.3f}" for change in row] for row in changes_LU], min(size, 7.0))
        names = [f"{result.unit} {index}" if num_units > 1 else "" for index in result.indices[:num_units]]
        label_columns(map_axes, names, rotation=90 if num_units > 6 else 0)
    else:
        map_axes.set_xlabel(f"{result.unit} {result.indices[0]} to {result.indices[-1]}", fontsize=8)
        label_columns(map_axes, [])
        style_text(map_axes.xaxis.label)
    set_title(map_axes, "all")
    add_scale(figure, image, map_axes, "change of the loss (nats)")
    strongest = result.order[:num_bars]
    draw_ablation_bars(bar_axes, result, strongest)
    errors = " Lines are standard errors, clustered by document." if result.num_documents > 1 else ""
    caption = (
        f"By how much the loss of {result.loss:.3f} nats a token rises (blue: the part was of use) or falls (red) when "
        f"one {result.unit} is replaced by {replacement(result.mode)}.{errors}"
    )
    return Picture(figure, f"The loss without each {result.unit}", caption)


def draw_ablation_bars(axes: Axes, result: Ablations, chosen: np.ndarray) -> None:
    changes, rows = result.changes[chosen], np.arange(len(chosen))
    errors = result.standard_errors[chosen]
    colours = [POSITIVE if change > 0 else NEGATIVE for change in changes]
    axes.barh(rows, changes, color=colours, height=0.7)
    if np.isfinite(errors).all():
        axes.errorbar(changes, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.invert_yaxis()
    label_rows(axes, [result.labels[number] for number in chosen])
    axes.set_xlabel("change of the loss (nats)", fontsize=8)
    style_axes(axes)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    set_title(axes, "largest first")


def replacement(mode: str) -> str:
    return {
        "mean": "its mean (Wang et al. 2022)",
        "zero": "nothing (Meyes et al. 2019)",
        "resample": "what it does in another text (Chan et al. 2022)",
    }[mode]


MOST_PARTS, MOST_ROWS = 24, 40
MOST_PANELS = 3
"""Positions with bars of their own; of more there is one map."""
COLUMN = 0.3
"""Inches of a position."""


def draw_logits(result: LogitAttribution, label: Label) -> Picture:
    """Which part writes the logit: a waterfall for each of a few positions, a signed map of many.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    if len(result.positions) <= MOST_PANELS:
        figure = draw_waterfalls(result, label)
        seen = "Each bar begins where the last one ended, and together they reach the model's own logit"
    else:
        figure = draw_logit_map(result, label)
        seen = "Blue adds to the logit, red takes from it, and each column sums to the model's own logit"
    caption = f"Direct logit attribution (Elhage et al. 2021): what each part writes in the token's direction. {seen}."
    return Picture(figure, f"Who writes the logit, by {result.by}", caption)


def draw_waterfalls(result: LogitAttribution, label: Label) -> Any:
    all_parts = [largest(named_parts(result, column, label)) for column in range(len(result.positions))]
    num_rows = max(map(len, all_parts))
    figure = new_figure(max(6.5, 5.0 * len(all_parts)), num_rows * ROW + 2.0)
    for column, axes in enumerate(figure.subplots(1, len(all_parts), squeeze=False)[0]):
        draw_waterfall(axes, all_parts[column])
        position = result.positions[column]
        where = f"after {fitted(label(result.tokens[position]))} at position {position}"
        set_title(axes, f"logit of {fitted(label(result.targets[column]))}{reference(result, label)}\n{where}")
    return figure


def draw_waterfall(axes: Axes, parts: list[tuple[str, float]]) -> None:
    added = np.array([value for _, value in parts])
    ends = added.cumsum()
    colours = [POSITIVE if value > 0 else NEGATIVE for value in added]
    rows = np.arange(len(parts))
    axes.barh(rows, added, left=ends - added, color=colours, height=0.7)
    axes.barh(len(parts), ends[-1], color=INK, alpha=0.55, height=0.7)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.invert_yaxis()
    label_rows(axes, [*(name for name, _ in parts), "sum"])
    reach = np.concatenate([ends, ends - added, [0.0]])
    span = float(np.ptp(reach)) or 1.0
    axes.set_xlim(reach.min() - 0.02 * span, reach.max() + 0.16 * span)
    for row, (value, right) in enumerate(
        zip([*added, ends[-1]], [*np.maximum(ends, ends - added), max(ends[-1], 0.0)], strict=True)
    ):
        number = axes.text(right + 0.01 * span, row, f"{value:+.2f}", va="center", fontsize=7)
        style_text(number)
    style_axes(axes)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("logit", fontsize=8)


def draw_logit_map(result: LogitAttribution, label: Label) -> Any:
    columns = [dict(named_parts(result, column, label)) for column in range(len(result.positions))]
    names = list(dict.fromkeys(name for column in columns for name in column))
    values = np.array([[column.get(name, np.nan) for column in columns] for name in names])
    if len(names) > MOST_ROWS:
        kept = np.sort(np.argsort(-np.nanmax(np.abs(values), axis=1), kind="stable")[:MOST_ROWS])
        names, values = [names[row] for row in kept], values[kept]
    figure = new_figure(max(6.0, len(columns) * COLUMN + 3.0), len(names) * ROW + 2.8)
    axes = figure.add_subplot()
    image = heat_map(axes, values, is_signed=True)
    label_rows(axes, names)
    tokens = [fitted(label(result.tokens[position])) for position in result.positions]
    targets = [fitted(label(target)) for target in result.targets]
    label_columns(axes, tokens, rotation=90)
    axes.set_xlabel("token, and above it the one whose logit is explained", fontsize=8)
    above = axes.secondary_xaxis("top")
    above.set_xticks(range(len(targets)), targets, rotation=90, fontsize=8)
    above.tick_params(length=0)
    above.spines[:].set_visible(False)
    style_text(axes.xaxis.label, *above.get_xticklabels())
    add_scale(figure, image, axes, f"added to the logit{reference(result, label)}")
    return figure


def reference(result: LogitAttribution, label: Label) -> str:
    """What was taken from the logit."""
    if result.versus is not None:
        return f" less that of {fitted(label(result.versus))}"
    if result.reference == "prediction":
        return " less the mean under p"
    return f" less the mean of {result.num_averaged:,}" if result.reference == "mean" else ""


def largest(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """At most `MOST_PARTS` of them in their order, and the sum of the others."""
    kept = set(sorted(range(len(parts)), key=lambda number: -abs(parts[number][1]))[:MOST_PARTS])
    rest = [added for number, (_, added) in enumerate(parts) if number not in kept]
    shown = [part for number, part in enumerate(parts) if number in kept]
    return [*shown, (f"{len(rest):,} others", sum(rest))] if rest else shown


def named_parts(result: LogitAttribution, column: int, label: Label) -> list[tuple[str, float]]:
    """What is added up at the result's level of detail at one of its positions, by name."""
    return by_source(result, column, label) if result.by == "source" else by_part(result, column)


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


def by_source(result: LogitAttribution, column: int, label: Label) -> list[tuple[str, float]]:
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


DIFF_CAPTION = (
    "KL: what is lost by expecting one model's next token where the other's is right, in nats. CKA (Kornblith et al. "
    "2019): 1 where two layers hold the same up to rotation and scale. Heads: how much the patterns of matched heads "
    "differ (Lin 1991), from 0, alike, to 1, nowhere alike. Weights: the change of each tensor, relative to its size "
    "in A."
)
MOST_DIFFERENT = 16
"""Heads and tensors of a panel, those that differ most; the files with numbers have all."""
MOST_LAYERS_WRITTEN = 8
"""Layers of a matrix whose cells hold their numbers."""


def draw_diff(result: ModelDiff) -> Picture:
    """A panel for each kind of difference that the two models have.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    panels = [
        (draw_predictions, result.predictions),
        (draw_cka, result.cka),
        (draw_matched_heads, result.heads),
        (draw_weights, result.weights if result.weights.tensors else None),
    ]
    shown = [(draw, part) for draw, part in panels if part is not None]
    columns = min(2, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = new_figure(5.5 * columns, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, (draw, part) in zip(axes, shown, strict=False):
        draw(place, part)
        style_text(place.xaxis.label, place.yaxis.label)
    for place in axes[len(shown) :]:
        place.remove()
    return Picture(figure, "What is different between two models", DIFF_CAPTION)


def draw_predictions(axes: Axes, found: PredictionDiff) -> None:
    """Both divergences along the window."""
    for values, name, colour, line in (
        (found.kl_ab_by_position, "KL(A||B)", COLOURS[0], "-"),
        (found.kl_ba_by_position, "KL(B||A)", COLOURS[1], "--"),
    ):
        axes.plot(found.position_numbers, values, color=colour, linestyle=line, linewidth=1.2, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the window", fontsize=8)
    axes.set_ylabel("nats a token", fontsize=8)
    style_axes(axes)
    set_title(axes, "predictions")
    style_text(*axes.legend(frameon=False, fontsize=8).get_texts())


def draw_cka(axes: Axes, cka: np.ndarray) -> None:
    """The matrix of all pairs of layers."""
    image = heat_map(axes, cka, low=0.0, high=1.0)
    names_a, names_b = (stream_names(count - 1) for count in cka.shape)
    label_rows(axes, names_a)
    label_columns(axes, names_b, rotation=0 if len(names_b) <= MOST_LAYERS_WRITTEN else 90)
    if max(cka.shape) <= MOST_LAYERS_WRITTEN + 1:
        write_cells(axes, image, [["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in cka])
    axes.set_xlabel("B", fontsize=8)
    axes.set_ylabel("A", fontsize=8)
    set_title(axes, "CKA of the residual streams")


def draw_matched_heads(axes: Axes, heads: HeadMatches) -> None:
    """The matched heads whose patterns differ most."""
    order = np.argsort(-heads.match_divergences, kind="stable")[:MOST_DIFFERENT]
    names = [f"{heads.heads_a[a]} → {heads.heads_b[b]}" for a, b in heads.matches[order]]
    draw_bars(axes, names, heads.match_divergences[order], "divergence of patterns")
    axes.set_xlim(0, 1)
    set_title(axes, f"matched heads, A → B ({shown_of(order, heads.match_divergences)})")


def draw_weights(axes: Axes, weights: WeightChanges) -> None:
    """The tensors that moved most for their size."""
    changes = np.nan_to_num(weights.relative_changes)
    order = np.argsort(-changes, kind="stable")[:MOST_DIFFERENT]
    names = [weights.tensors[number].removesuffix(".weight") for number in order]
    draw_bars(axes, names, changes[order], "relative change")
    axes.set_xlim(left=0)
    set_title(axes, f"weights ({shown_of(order, changes)})")


def draw_bars(axes: Axes, names: list[str], values: np.ndarray, what: str) -> None:
    axes.barh(range(len(names)), values, color=COLOURS[0])
    axes.invert_yaxis()
    axes.set_xlabel(what, fontsize=8)
    style_axes(axes)
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(names)), names, fontsize=6)
    style_text(*axes.get_yticklabels())


def shown_of(order: np.ndarray, values: np.ndarray) -> str:
    return "all" if len(order) == len(values) else f"{len(order)} of {len(values)} that differ most"


LAYER_ROW = 0.3
"""Inches of a layer."""


def draw_summary(result: ModelSummary) -> Picture:
    """Parameters, ranks and sizes of the matrices, and what each part writes, where a text was at hand.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    num_layers = len(result.gain_names) // 2
    figure = new_figure(12.0, 2 * max(num_layers * LAYER_ROW, 1.4) + 3.0)
    (parameter_axes, rank_axes), (write_axes, rms_axes) = figure.subplots(2, 2)
    draw_parameters(parameter_axes, result)
    kinds = list(dict.fromkeys(kind_of(name) for name in result.matrices if name.startswith("blocks.")))
    for axes, values, name, shown in (
        (
            rank_axes,
            result.effective_ranks / result.shapes.min(axis=1),
            "effective rank, share of the largest",
            "{:.0%}",
        ),
        (rms_axes, result.rms, "root mean square of the weights", "{:.3f}"),
    ):
        table = by_layer(result, values, kinds)
        image = heat_map(axes, table, low=0.0, high=1.0 if axes is rank_axes else None)
        label_rows(axes, [f"L{layer}" for layer in range(num_layers)])
        label_columns(axes, kinds)
        write_cells(axes, image, [["" if np.isnan(value) else shown.format(value) for value in row] for row in table])
        set_title(axes, name)
        add_scale(figure, image, axes, "share" if axes is rank_axes else "rms")
    if result.writes is None or result.head_writes is None:
        write_axes.remove()
    else:
        table = np.concatenate([result.writes, result.head_writes], axis=1)
        image = heat_map(write_axes, table, low=0.0)
        label_rows(write_axes, [f"L{layer}" for layer in range(num_layers)])
        names = ["attention", "feed-forward", *(f"H{head}" for head in range(result.head_writes.shape[1]))]
        label_columns(write_axes, names, rotation=90)
        write_cells(write_axes, image, [[f"{value:.0%}" for value in row] for row in table])
        set_title(write_axes, "what each part writes, as a share of the stream before it")
        add_scale(figure, image, write_axes, "share of the norm")
    caption = (
        "Where the parameters are, how full the matrices are (effective rank, Roy & Vetterli 2007) and how large, and "
        "how much each part adds to the residual stream."
    )
    return Picture(figure, "What is in the model", caption)


def draw_parameters(axes: Axes, result: ModelSummary) -> None:
    counts = {name.replace("_", " "): count for name, count in result.parameters.items() if count}
    rows, total = np.arange(len(counts)), sum(counts.values())
    axes.barh(rows, list(counts.values()), color=COLOURS[0], height=0.65)
    axes.invert_yaxis()
    axes.set_yticks(rows, list(counts), fontsize=8)
    axes.set_xlim(0, 1.3 * max(counts.values()))
    for row, count in enumerate(counts.values()):
        text = axes.text(count + 0.01 * total, row, f"{count:,} ({count / total:.0%})", va="center", fontsize=8)
        text.set_color(INK)
    style_axes(axes)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0, labelbottom=False)
    style_text(*axes.get_yticklabels())
    set_title(axes, f"{total:,} parameters")


def kind_of(matrix: str) -> str:
    """`query` of blocks.0.attention.query.weight."""
    return matrix.split(".")[-2]


def by_layer(result: ModelSummary, values: np.ndarray, kinds: list[str]) -> np.ndarray:
    """(L, kinds) the values of the blocks' matrices, NaN where a layer has none of a kind."""
    table = np.full((len(result.gain_names) // 2, len(kinds)), np.nan)
    for name, value in zip(result.matrices, values, strict=True):
        if name.startswith("blocks."):
            table[int(name.split(".")[1]), kinds.index(kind_of(name))] = value
    return table
