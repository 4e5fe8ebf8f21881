"""The parts of the report page that are there without scripts: what the model is, its losses, heads and receipts."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lumiere.config.schema import RunConfig
from lumiere.evaluation.clusters import half_width
from lumiere.interpret.heads import HeadScores
from lumiere.persistence.metrics import History, Point
from lumiere.report.card_training import corpus_name
from lumiere.report.inspection import Inspection
from lumiere.training.costs import count_parameters

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 20, 36


def overview(inspection: Inspection, config: RunConfig, about: Mapping[str, Any]) -> str:
    """What this model is, in words."""
    model, parameters = config.model, count_parameters(config).total
    first = (
        f"This is a small language model: {parameters:,} numbers, learned from the text "
        f"<q>{html.escape(corpus_name(config.dataset))}</q>. It reads at most {model.context_size} tokens and says how "
        f"likely each of its {config.tokenizer.vocab_size:,} tokens is to come next. It does so in "
        f"{counted(model.num_layers, 'layer')}, each with {counted(model.num_heads, 'attention head')} that fetch "
        f"information from earlier tokens and {counted(model.d_ff, 'neuron')} that work on each token alone."
    )
    warnings = inspection.summary.warnings
    second = (
        "Nothing looked wrong in its weights."
        if not warnings
        else "Worth a look: " + "; ".join(f"{html.escape(check.what)} ({check.count:,})" for check in warnings) + "."
    )
    step = f"The page shows checkpoint {html.escape(str(about['checkpoint']))}, after {about['step']:,} updates."
    return f"<p class='lead'>{first}</p>\n<p>{step} {second}</p>"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def facts_table(inspection: Inspection, config: RunConfig, about: Mapping[str, Any]) -> str:
    """The parameters by part, and what the model was measured on."""
    parts = inspection.summary.parameters
    total = sum(parts.values())
    rows = [(name.replace("_", " "), f"{count:,}", f"{count / total:.1%}") for name, count in parts.items()]
    rows.append(("all together", f"{total:,}", "100.0%"))
    source = str(about["source"]).replace(config.dataset.name, corpus_name(config.dataset))
    weights = f"The weights have the SHA-256 {html.escape(str(about['weights_sha256']))[:16]}…"
    measured = f"Measured on {html.escape(source)}. {weights}"
    return table(("part", "parameters", "share"), rows, "Where the parameters are") + f"<p class='note'>{measured}</p>"


def head_table(inspection: Inspection) -> str:
    """The score of each head beside that of one that looks everywhere alike, and what the loss is without it."""
    heads, ablation = inspection.heads, inspection.ablation
    uniform = [share(value) for value in heads.uniform]
    text_scores = text_induction(heads)
    on_text = [] if text_scores is None else ["induction on text"]
    names = [*heads.score_names, *on_text, "copying", *([] if ablation is None else ["loss without it"]), "role"]
    rows: list[Sequence[str]] = []
    for layer in range(len(heads.layers)):
        for head in range(len(heads.heads)):
            roles = heads.roles[layer][head]
            cells = [share(value) for value in heads.scores[layer, head]]
            marked = [
                score_cell(cell, heads.scores[layer, head, number], heads.score_names[number] in roles)
                for number, cell in enumerate(cells)
            ]
            copying = heads.copying[layer, head]
            cost = []
            if ablation is not None:
                number = layer * len(heads.heads) + head
                cost = [signed(ablation.changes[number], 3)]
            copies = "–" if math.isnan(copying) else signed(copying, 2)
            if text_scores is not None:
                marked.append(score_cell(share(text_scores[layer, head]), text_scores[layer, head], is_role=False))
            rows.append((f"L{layer}H{head}", *marked, copies, *cost, ", ".join(roles) or "–"))
    if text_scores is not None and heads.text_uniform is not None:
        uniform.append(share(heads.text_uniform[heads.score_names.index("induction")]))
    rows.append(("uniform", *uniform, "0", *([] if ablation is None else ["–"]), "–"))
    return table(("head", *names), rows, "Scores of all heads", escaped=True) + repeat_gap(heads)


def text_induction(heads: HeadScores) -> np.ndarray | None:
    """(L, H) the induction scores at repeated names of the validation split; None if there are none."""
    if heads.text_scores is None or not heads.text_repeats:
        return None
    return heads.text_scores[..., heads.score_names.index("induction")]


def repeat_gap(heads: HeadScores) -> str:
    """What the model gains by looking back, in words: on random tokens, and on text."""
    found = []
    if not math.isnan(heads.repeat_gap):
        found.append(gain("Random tokens", float(heads.repeat_gap), float(heads.repeat_gap_error), len(heads.tokens)))
    if heads.text_repeats and heads.text_gap is not None and heads.text_gap_error is not None:
        documents = heads.text_documents or 0
        repeats = f"{counted(heads.text_repeats, 'repeat')} in {counted(documents, 'document')}"
        what = f"Names in the validation split ({repeats})"
        found.append(gain(what, float(heads.text_gap), float(heads.text_gap_error), documents))
    return f"<p>{' '.join(found)}</p>" if found else ""


def gain(what: str, gap: float, error: float, count: int) -> str:
    """Whether tokens are easier to predict when repeated.

    Args:
        count: of the sequences or documents behind the standard error.
    """
    if count < 2:
        return f"{what}: {signed(gap, 2)} nats easier when repeated; a single text has no standard error."
    verdict = "easier" if gap > half_width(count) * error else "not easier"
    return f"{what} are {verdict} for the model when repeated ({signed(gap, 2)} ± {error:.2f} nats)."


def score_cell(shown: str, score: float, is_role: bool) -> str:
    """A share with its shade, bold where it makes a role."""
    text = f"<strong>{shown}</strong>" if is_role else shown
    return text if math.isnan(score) else f"<span class='shade' style='--shade:{score:.3f}'>{text}</span>"


def signed(value: float, decimals: int) -> str:
    """With its sign, and a real minus."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def receipt_table(inspection: Inspection) -> str:
    rows = [
        (name, receipt.law, f"{receipt.error:.0e}", f"{receipt.tolerance:.0e}", "holds" if receipt.holds else "FAILED")
        for name, result in inspection.results()
        for receipt in result.receipts
    ]
    num_failed = sum(row[-1] == "FAILED" for row in rows)
    verdict = f"All {len(rows)} hold." if not num_failed else f"{num_failed} of {len(rows)} FAILED."
    names = ("analysis", "law", "off by", "allowed", "verdict")
    return f"<p id='verdict'>{verdict}</p>" + table(names, rows, "All receipts", fold=True)


def share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def table(
    names: Sequence[str], rows: Iterable[Sequence[str]], caption: str, escaped: bool = False, fold: bool = False
) -> str:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        escaped: the cells are HTML already.
        fold: behind a line to open.
    """
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in names)
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td>{cell if escaped else html.escape(cell)}</td>" for cell in rest)
        body.append(f"<tr><th scope='row'>{first if escaped else html.escape(first)}</th>{cells}</tr>")
    shown = (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{html.escape(caption)}'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )
    return f"<details><summary>{html.escape(caption)}</summary>{shown}</details>" if fold else shown


def loss_picture(history: History) -> str:
    """Training and validation loss over steps, as SVG."""
    points = [*history.training, *history.validation]
    if not points:
        return "<p class='note'>The run has no losses on record.</p>"
    last_step = max(point.step for point in points) or 1
    lowest, highest = (math.floor(min(p.loss for p in points)), math.ceil(max(p.loss for p in points)))
    highest = max(highest, lowest + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last_step

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (highest - loss) / (highest - lowest)

    def path(curve: Sequence[Point]) -> str:
        return " ".join(f"{x(point.step):.1f},{y(point.loss):.1f}" for point in curve)

    spacing = max(1, (highest - lowest) // 6)
    grid = "".join(
        f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(loss):.1f}' y2='{y(loss):.1f}'/>"
        f"<text x='{LEFT - 8}' y='{y(loss) + 4:.1f}' text-anchor='end'>{loss}</text>"
        for loss in range(lowest, highest + 1, spacing)
    )
    ticks = "".join(
        f"<text x='{x(step):.1f}' y='{HEIGHT - 12}' text-anchor='{anchor}'>{step:,}</text>"
        for step, anchor in ((0, "start"), (last_step // 2, "middle"), (last_step, "end"))
    )
    best = min(history.validation, key=lambda point: point.loss, default=None)
    told = "" if best is None else f" The best validation loss is {best.loss:.3f}, at step {best.step:,}."
    return (
        f"<figure><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='Loss curves.{told}'>{grid}{ticks}"
        f"<polyline class='training' points='{path(history.training)}'/>"
        f"<polyline class='validation' points='{path(history.validation)}'/></svg>"
        "<figcaption>Loss in nats a token, over updates: <span class='key training'>training</span>, one batch a "
        f"point, and <span class='key validation'>validation</span>, text that it never learned from.{told} A loss of "
        "4 means that the model is on average as unsure as between e<sup>4</sup> ≈ 55 equally likely tokens."
        "</figcaption></figure>"
    )
