"""Figures with bars: logit attribution, head scores, ablations, the difference of two models, and model summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lumiere.report.figures.figure import (
    COLORS,
    INK,
    Picture,
    add_legend,
    fitted,
    label_axes,
    new_figure,
    style_axes,
    style_text,
)
from lumiere.report.figures.heat_maps import (
    NEGATIVE,
    POSITIVE,
    ROW,
    Label,
    add_scale,
    fitting_font,
    heat_map,
    label_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lumiere.interpret.ablation import Ablations
    from lumiere.interpret.head_scores import HeadScores
    from lumiere.interpret.joint_ablation import JointAblations
    from lumiere.interpret.logit_attribution import LogitAttribution
    from lumiere.interpret.model_diff import HeadMatches, ModelDiff, PredictionDiff, WeightChanges
    from lumiere.interpret.summary import ModelSummary

MAX_BARS = 16
"""Bars of a ranking; the files with numbers have all."""
MAX_PARTS, MAX_MAP_ROWS = 24, 40
"""Of a logit: bars in a waterfall, rows in a map."""
MAX_WATERFALLS = 3
"""Above this many positions, one map is drawn instead."""
MAX_UNIT_NUMBERS, MAX_LAYER_NUMBERS = 16, 8
"""Maps with more columns than this have no numbers in their cells."""
POSITION_WIDTH, LAYER_HEIGHT = 0.3, 0.3
"""Inches."""


def draw_bars(
    axes: Axes,
    names: Sequence[str],
    values: np.ndarray,
    xlabel: str,
    colors: str | Sequence[str] = COLORS[0],
    left: np.ndarray | float = 0.0,
    fontsize: float = 8,
) -> None:
    """Draw horizontal bars from top to bottom."""
    axes.barh(range(len(names)), values, left=left, color=colors, height=0.7)
    axes.invert_yaxis()
    label_axes(axes, xlabel=xlabel)
    style_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(labelsize=8)
    label_rows(axes, names, fontsize)


def signed_colors(values: np.ndarray) -> list[str]:
    return [POSITIVE if value > 0 else NEGATIVE for value in values]


def draw_heads(result: HeadScores) -> Picture:
    """Draw the scores of all heads, whether they copy, and the loss along the sequences."""
    names = [f"L{layer}H{head}" for layer in result.layers for head in result.heads]
    figure = new_figure(12.5, max(len(names) * ROW, 2.5) + 2.2)
    score_axes, copying_axes, loss_axes = figure.subplots(1, 3, width_ratios=(5, 1, 5))
    scores, columns = result.scores.reshape(len(names), -1), result.score_names
    image = heat_map(score_axes, scores, low=0.0, high=1.0, rows=names, columns=columns, form="{:.0%}")
    uniform = zip(result.score_names, result.uniform, strict=True)
    baseline = ", ".join(f"{name} {value:.0%}" for name, value in uniform if np.isfinite(value))
    label_axes(score_axes, "attention", f"uniform attention: {baseline}")
    add_scale(figure, image, score_axes, "attention")
    copying = result.copying.reshape(-1, 1)
    heat_map(copying_axes, copying, high=1.0, is_signed=True, rows=[], columns=[""], form="{:+.2f}")
    label_axes(copying_axes, "copying")
    draw_loss_by_position(loss_axes, result)
    caption = (
        "Left: mean attention of each head to these positions (prefix matching and others, Olsson et al. 2022). "
        "Middle: copying score from the weights, blue: copies, red: suppresses (Elhage et al. 2021). Right: loss along "
        "the sequences; it drops where heads find an earlier occurrence."
    )
    return Picture(figure, "Head scores", caption)


def draw_loss_by_position(axes: Axes, result: HeadScores) -> None:
    """Draw the loss at each position, the second copy of repeated tokens over the first."""
    places = np.arange(1, len(result.losses) + 1)
    if np.isnan(result.repeat_gap):
        axes.plot(places, result.losses, color=COLORS[0], linewidth=1.4)
    else:
        length = len(result.losses) // 2
        axes.plot(places[:length], result.losses[:length], color=COLORS[0], label="first copy")
        axes.plot(places[:length], result.losses[length : 2 * length], "--", color=COLORS[1], label="second copy")
        add_legend(axes, fontsize=8)
    axes.set_ylim(bottom=0)
    label_axes(axes, "mean loss by position", "position", "loss (nats)")
    axes.tick_params(labelsize=8)
    style_axes(axes)


ABLATION_MODES = {
    "mean": "mean-ablated (Wang et al. 2022)",
    "zero": "zero-ablated (Meyes et al. 2019)",
    "resample": "resampled from another text (Chan et al. 2022)",
}


def draw_ablations(result: Ablations) -> Picture:
    """Draw the change of the loss without each unit: all units as a signed map, the largest changes as bars."""
    layers = list(dict.fromkeys(result.layers.tolist()))
    changes_LU = result.changes.reshape(len(layers), -1)
    num_units = changes_LU.shape[1]
    chosen = result.order[:MAX_BARS]
    figure = new_figure(11.0, max(len(layers) * 0.45, len(chosen) * ROW, 1.8) + 2.0)
    map_axes, bar_axes = figure.subplots(1, 2, width_ratios=(3, 2) if num_units > 1 else (1, 3))
    names, form = [], None
    if num_units <= MAX_UNIT_NUMBERS:
        names = [f"{result.unit} {index}" if num_units > 1 else "" for index in result.indices[:num_units]]
        form = "{:+.3f}"
    image = heat_map(
        map_axes,
        changes_LU,
        is_signed=True,
        rows=[f"L{layer}" for layer in layers],
        columns=names,
        rotation=90 if num_units > 6 else 0,
        form=form,
        fontsize=min(fitting_font(6.0 / num_units, 1) or 6.0, 7.0),
    )
    label_axes(map_axes, "all", None if names else f"{result.unit} {result.indices[0]} to {result.indices[-1]}")
    add_scale(figure, image, map_axes, "change of the loss (nats)")
    changes, errors = result.changes[chosen], result.standard_errors[chosen]
    labels = [result.labels[number] for number in chosen]
    draw_bars(bar_axes, labels, changes, "change of the loss (nats)", signed_colors(changes))
    if np.isfinite(errors).all():
        bar_axes.errorbar(changes, range(len(changes)), xerr=errors, fmt="none", ecolor=INK, elinewidth=1)
    bar_axes.axvline(0, color=INK, linewidth=0.8)
    label_axes(bar_axes, "largest first")
    bars = " Error bars: standard errors, clustered by document." if result.num_documents > 1 else ""
    caption = (
        f"Change of the loss of {result.loss:.3f} nats/token when one {result.unit} is {ABLATION_MODES[result.mode]}. "
        f"Blue: the loss rises, the {result.unit} helped; red: it falls.{bars}"
    )
    return Picture(figure, f"Loss without each {result.unit}", caption)


def draw_joint_ablations(result: JointAblations) -> Picture:
    """Draw for each set of parts the joint change of the loss and the sum of the single ones."""
    chosen = result.order[:MAX_BARS]
    figure = new_figure(9.0, max(len(chosen) * ROW, 1.8) + 2.0)
    both = figure.subplots(1, 2)
    names = [result.sets[number] for number in chosen]
    values = {"without all of a set": (result.joint, result.joint_errors)}
    values["interaction: minus the sum of the single changes"] = result.interactions, result.interaction_errors
    for axes, (title, (changes, errors)) in zip(both, values.items(), strict=True):
        draw_bars(axes, names, changes[chosen], "nats", signed_colors(changes[chosen]))
        if np.isfinite(errors[chosen]).all():
            places = range(len(chosen))
            axes.errorbar(changes[chosen], places, xerr=errors[chosen], fmt="none", ecolor=INK, elinewidth=1)
        axes.axvline(0, color=INK, linewidth=0.8)
        label_axes(axes, title)
    caption = (
        f"Change of the loss of {result.loss:.3f} nats/token when parts are {ABLATION_MODES[result.mode]} together. "
        "An interaction above 0: the parts stand in for each other; below 0: they need each other."
    )
    return Picture(figure, "Loss without several parts", caption)


def draw_logits(result: LogitAttribution, label: Label) -> Picture:
    """Draw which part adds what to a logit: waterfalls for a few positions, a signed map for many."""
    if len(result.positions) <= MAX_WATERFALLS:
        figure = draw_waterfalls(result, label)
        seen = "Each bar starts where the previous one ends; together they reach the model's logit"
    else:
        figure = draw_logit_map(result, label)
        seen = "Blue adds to the logit, red subtracts from it; each column sums to the model's logit"
    caption = f"Direct logit attribution (Elhage et al. 2021): what each part adds to the token's logit. {seen}."
    return Picture(figure, f"Logit attribution by {result.by}", caption)


def draw_waterfalls(result: LogitAttribution, label: Label) -> Figure:
    by_position = (
        largest_parts(named_parts(result, column, label), MAX_PARTS) for column in range(len(result.positions))
    )
    all_parts = [[*largest, *others] for largest, others in by_position]
    figure = new_figure(max(6.5, 5.0 * len(all_parts)), max(map(len, all_parts)) * ROW + 2.0)
    for column, axes in enumerate(figure.subplots(1, len(all_parts), squeeze=False)[0]):
        draw_waterfall(axes, all_parts[column])
        position = result.positions[column]
        where = f"after {fitted(label(result.tokens[position]))} at position {position}"
        label_axes(axes, f"logit of {fitted(label(result.targets[column]))}{reference(result, label)}\n{where}")
    return figure


def draw_waterfall(axes: Axes, parts: list[tuple[str, float]]) -> None:
    added = np.array([value for _, value in parts])
    ends = added.cumsum()
    values, starts = np.append(added, ends[-1]), np.append(ends - added, 0.0)
    names = [*(name for name, _ in parts), "sum"]
    draw_bars(axes, names, values, "logit", [*signed_colors(added), INK], starts)
    axes.patches[-1].set_alpha(0.55)
    axes.axvline(0, color=INK, linewidth=0.8)
    low, high = np.minimum(starts, starts + values), np.maximum(starts, starts + values)
    span = float(high.max() - low.min()) or 1.0
    axes.set_xlim(low.min() - 0.02 * span, high.max() + 0.16 * span)
    for row, (value, right) in enumerate(zip(values, high, strict=True)):
        style_text(axes.text(right + 0.01 * span, row, f"{value:+.2f}", va="center", fontsize=7))


def draw_logit_map(result: LogitAttribution, label: Label) -> Figure:
    columns = [dict(named_parts(result, column, label)) for column in range(len(result.positions))]
    names = list(dict.fromkeys(name for column in columns for name in column))
    values = np.array([[column.get(name, np.nan) for column in columns] for name in names])
    if len(names) > MAX_MAP_ROWS:
        kept = np.sort(np.argsort(-np.nanmax(np.abs(values), axis=1), kind="stable")[:MAX_MAP_ROWS])
        names, values = [names[row] for row in kept], values[kept]
    figure = new_figure(max(6.0, len(columns) * POSITION_WIDTH + 3.0), len(names) * ROW + 2.8)
    axes = figure.add_subplot()
    tokens = [fitted(label(result.tokens[position])) for position in result.positions]
    image = heat_map(axes, values, is_signed=True, rows=names, columns=tokens, rotation=90)
    label_axes(axes, xlabel="token (above: the token whose logit is explained)")
    above = axes.secondary_xaxis("top")
    targets = [fitted(label(target)) for target in result.targets]
    above.set_xticks(range(len(targets)), targets, rotation=90, fontsize=8)
    above.tick_params(length=0)
    above.spines[:].set_visible(False)
    style_text(*above.get_xticklabels())
    add_scale(figure, image, axes, f"added to the logit{reference(result, label)}")
    return figure


def reference(result: LogitAttribution, label: Label) -> str:
    """What the logit is relative to."""
    if result.versus is not None:
        return f" minus that of {fitted(label(result.versus))}"
    if result.reference == "prediction":
        return " minus the mean under p"
    return f" minus the mean of {result.num_averaged:,}" if result.reference == "mean" else ""


Part = tuple[str, float]
"""A summand of a logit: its name and its value."""


def largest_parts(parts: Sequence[Part], count: int) -> tuple[list[Part], list[Part]]:
    """The `count` largest in their order, and the sum of the others as one part, if there are any."""
    kept = set(sorted(range(len(parts)), key=lambda number: -abs(parts[number][1]))[:count])
    rest = [added for number, (_, added) in enumerate(parts) if number not in kept]
    shown = [part for number, part in enumerate(parts) if number in kept]
    return shown, [(f"{len(rest):,} others", sum(rest))] if rest else []


def named_parts(result: LogitAttribution, column: int, label: Label) -> list[tuple[str, float]]:
    """The summands of a logit at the result's level of detail, by name.

    By source: what all heads together read from each token, then what is added at the position itself. Other levels
    that are finer than layers have many parts, and start with the largest.
    """
    parts = [
        (part_name(part), float(added_P[column]))
        for part, added_P in result.parts(result.by)
        if result.by != "source" or part["part"] != "head"
    ]
    if result.by == "layer":
        return parts
    if result.by != "source":
        return sorted(parts, key=lambda part: -abs(part[1]))
    read_S = result.sources[column].reshape(-1, len(result.tokens)).sum(axis=0)[: result.positions[column] + 1]
    names = [f"{source:3} {fitted(label(result.tokens[source]))}" for source in range(len(read_S))]
    return [*zip(names, read_S.tolist(), strict=True), *parts]


PART_NAMES = {
    "embed": "embed",
    "pos_embed": "position",
    "attention": "L{layer} attention",
    "feedforward": "L{layer} feed-forward",
    "head": "L{layer}H{head}",
    "neuron": "L{layer}N{neuron}",
    "attention_bias": "L{layer} attn bias",
    "feedforward_bias": "L{layer} MLP bias",
    "final_bias": "final norm bias",
}


def part_name(part: Mapping[str, Any]) -> str:
    return PART_NAMES[part["part"]].format(**part)


def draw_diff(result: ModelDiff) -> Picture:
    """Draw a panel for each comparison that the two models allow."""
    panels = [
        (draw_predictions, result.predictions),
        (draw_cka, result.cka),
        (draw_matched_heads, result.heads),
        (draw_weight_changes, result.weights if result.weights.tensors else None),
    ]
    shown = [(draw, part) for draw, part in panels if part is not None]
    columns = min(2, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = new_figure(5.5 * columns, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, (draw, part) in zip(axes, shown, strict=False):
        draw(place, part)
    for place in axes[len(shown) :]:
        place.remove()
    caption = (
        "KL divergence between the next-token distributions, in nats. CKA (Kornblith et al. 2019): 1 if two layers "
        "agree up to rotation and scale. Heads: distance between the patterns of matched heads (Lin 1991), from 0 "
        "(equal) to 1 (disjoint). Weights: change of each tensor relative to its norm in A."
    )
    return Picture(figure, "Difference between two models", caption)


def draw_predictions(axes: Axes, found: PredictionDiff) -> None:
    axes.plot(found.position_numbers, found.kl_ab_by_position, "-", color=COLORS[0], linewidth=1.2, label="KL(A||B)")
    axes.plot(found.position_numbers, found.kl_ba_by_position, "--", color=COLORS[1], linewidth=1.2, label="KL(B||A)")
    axes.set_ylim(bottom=0)
    label_axes(axes, "predictions", "position in the window", "KL (nats/token)")
    style_axes(axes)
    add_legend(axes, fontsize=8)


def draw_cka(axes: Axes, cka: np.ndarray) -> None:
    from lumiere.interpret.model_diff import stream_names

    names_a, names_b = (stream_names(count - 1) for count in cka.shape)
    rotation = 0 if len(names_b) <= MAX_LAYER_NUMBERS else 90
    form = "{:.2f}" if max(cka.shape) <= MAX_LAYER_NUMBERS + 1 else None
    heat_map(axes, cka, low=0.0, high=1.0, rows=names_a, columns=names_b, rotation=rotation, form=form)
    label_axes(axes, "CKA of the residual streams", "B", "A")


def draw_matched_heads(axes: Axes, heads: HeadMatches) -> None:
    names = [f"{heads.heads_a[a]} → {heads.heads_b[b]}" for a, b in heads.matches]
    draw_largest(axes, names, heads.match_divergences, "matched heads, A → B", "divergence of the patterns")
    axes.set_xlim(0, 1)


def draw_weight_changes(axes: Axes, weights: WeightChanges) -> None:
    names = [name.removesuffix(".weight") for name in weights.tensors]
    draw_largest(axes, names, np.nan_to_num(weights.relative_changes), "weights", "relative change")
    axes.set_xlim(left=0)


def draw_largest(axes: Axes, names: list[str], values: np.ndarray, title: str, xlabel: str) -> None:
    """Draw the `MAX_BARS` largest values as bars."""
    order = np.argsort(-values, kind="stable")[:MAX_BARS]
    draw_bars(axes, [names[number] for number in order], values[order], xlabel, fontsize=6)
    shown = "all" if len(order) == len(values) else f"the {len(order)} most different of {len(values)}"
    label_axes(axes, f"{title} ({shown})")


def draw_summary(result: ModelSummary) -> Picture:
    """Draw parameter counts, effective ranks and sizes of the matrices, and what each part writes, if measured."""
    num_layers = len(by_layer(result, result.rms)[1])
    layers = [f"L{layer}" for layer in range(num_layers)]
    figure = new_figure(12.0, 2 * max(num_layers * LAYER_HEIGHT, 1.4) + 3.0)
    (parameter_axes, rank_axes), (write_axes, rms_axes) = figure.subplots(2, 2)
    draw_parameters(parameter_axes, result)
    kinds, ranks = by_layer(result, result.effective_ranks / result.shapes.min(axis=1))
    maps = [
        (rank_axes, ranks, kinds, 1.0, "{:.0%}", "effective rank / full rank", "ratio"),
        (rms_axes, by_layer(result, result.rms)[1], kinds, None, "{:.3f}", "RMS of the weights", "RMS"),
    ]
    if result.writes is None or result.head_writes is None:
        write_axes.remove()
    else:
        names = ["attention", "feed-forward", *(f"H{head}" for head in range(result.head_writes.shape[1]))]
        writes = np.concatenate([result.writes, result.head_writes], axis=1)
        title = "norm of what each part adds / norm of the stream before it"
        maps.insert(1, (write_axes, writes, names, None, "{:.0%}", title, "ratio"))
    for axes, values, names, high, form, title, unit in maps:
        rotation = 90 if axes is write_axes else 0
        image = heat_map(axes, values, low=0.0, high=high, rows=layers, columns=names, rotation=rotation, form=form)
        label_axes(axes, title)
        add_scale(figure, image, axes, unit)
    caption = (
        "Parameters by part, effective rank (Roy & Vetterli 2007) and size of the weight matrices, and how much each "
        "part adds to the residual stream."
    )
    return Picture(figure, "Model summary", caption)


def draw_parameters(axes: Axes, result: ModelSummary) -> None:
    counts = {name.replace("_", " "): count for name, count in result.parameters.items() if count}
    total = sum(counts.values())
    draw_bars(axes, list(counts), np.array(list(counts.values())), "")
    axes.set_xlim(0, 1.3 * max(counts.values()))
    for row, count in enumerate(counts.values()):
        text = f"{count:,} ({count / total:.0%})"
        style_text(axes.text(count + 0.01 * total, row, text, va="center", fontsize=8))
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0, labelbottom=False)
    label_axes(axes, f"{total:,} parameters")


def by_layer(result: ModelSummary, values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The kinds of the blocks' matrices, such as `query`, and (L, kinds) values; NaN if a layer has none of a kind."""
    places = [name.split(".") for name in result.matrices]
    kinds = list(dict.fromkeys(place[-2] for place in places if place[0] == "blocks"))
    num_layers = 1 + max(int(place[1]) for place in places if place[0] == "blocks")
    table = np.full((num_layers, len(kinds)), np.nan)
    for place, value in zip(places, values, strict=True):
        if place[0] == "blocks":
            table[int(place[1]), kinds.index(place[-2])] = value
    return kinds, table
