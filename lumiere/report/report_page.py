"""The report page: one HTML file with its style, its scripts and its numbers inside, that asks nothing of a network."""

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from lumiere.config.schema import RunConfig
from lumiere.data.batches import Batch
from lumiere.data.tokenizer import PAD, SPECIAL_TOKENS
from lumiere.evaluation.scoring import half_width
from lumiere.interpret.ablation import Ablations, ablate
from lumiere.interpret.attention import AttentionPatterns, attention_patterns
from lumiere.interpret.head_scores import HeadScores, score_heads
from lumiere.interpret.logit_attribution import LogitAttribution, logit_attribution
from lumiere.interpret.logit_lens import NO_TARGET, LogitLens, logit_lens
from lumiere.interpret.neurons import NO_EXAMPLE, NeuronExamples, TokenMap, neuron_examples, token_map
from lumiere.interpret.result import Result
from lumiere.interpret.summary import ModelSummary, summarize
from lumiere.interpret.token_losses import TokenLosses, token_losses
from lumiere.models.transformer import Transformer
from lumiere.persistence.metrics import History, Point
from lumiere.report.model_card import corpus_name
from lumiere.training.costs import count_parameters

CANDIDATES = 3
"""The model's most probable next words that are explained at each position; the text's own next word is another."""
LENS_TOKENS = 3
MAP_TOKENS = 300
MOST_NEURONS = 1024
"""Of all layers together, so that the page stays small."""


@dataclass(frozen=True)
class Text:
    """A text to look at.

    Attributes:
        tokens: (T,) at least two ids.
        source: where they come from, in words.
    """

    tokens: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class TextInspection:
    """What a model does on one text. `candidates` has one attribution of all positions for each of C words.

    Attributes:
        candidates: of the most probable words, the best first, and last of the word that the text goes on with; at the
            last position, where it does not, of the most probable again.
    """

    text: Text
    attention: AttentionPatterns
    lens: LogitLens
    losses: TokenLosses
    candidates: tuple[LogitAttribution, ...]


@dataclass(frozen=True)
class Inspection:
    """What a model is, on the texts and on the validation split.

    Attributes:
        texts: at least one.
        ablation: of each head; None without validation text, as `neurons`.
    """

    summary: ModelSummary
    texts: tuple[TextInspection, ...]
    heads: HeadScores
    ablation: Ablations | None
    neurons: NeuronExamples | None
    embeddings: TokenMap

    def results(self) -> list[tuple[str, Result]]:
        """All results, and the commands that give the same."""
        named: list[tuple[str, Result | None]] = [
            ("summary", self.summary),
            ("heads", self.heads),
            ("ablate", self.ablation),
            ("neurons", self.neurons),
            ("embeddings", self.embeddings),
        ]
        for number, text in enumerate(self.texts, 1):
            named += [(f"attention, text {number}", text.attention), (f"lens, text {number}", text.lens)]
            named += [(f"tokens, text {number}", text.losses)]
            named += [(f"logits, text {number}, word {rank}", of) for rank, of in enumerate(text.candidates, 1)]
        return [(name, result) for name, result in named if result is not None]


def inspect_model(
    model: Transformer,
    texts: Sequence[Text],
    repeated_NT: torch.Tensor,
    batches: Sequence[Batch] = (),
    windows: tuple[torch.Tensor, np.ndarray] | None = None,
    token_counts: np.ndarray | None = None,
    num_used: int | None = None,
    averaged: Sequence[int] | None = None,
) -> Inspection:
    """Every analysis that the page shows.

    Args:
        model: in evaluation mode.
        texts: to look at, each of 2 to `context_size` tokens.
        repeated_NT: random tokens that come twice, for the heads' scores.
        batches: validation windows; none: no ablation and no neurons.
        windows: of the validation split, with their documents, for the in-context-learning score and natural repeats.
        token_counts: how often each token stands in the training split, for the map; None: the first tokens.
        num_used: ids that the tokenizer gives out; None: all.
        averaged: the tokens over which centered logits and copying average; None: all.
    """
    num_neurons = min(model.d_ff, MOST_NEURONS // model.num_layers)
    return Inspection(
        summary=summarize(model, batches, token_counts),
        texts=tuple(inspect_text(model, text, averaged) for text in texts),
        heads=score_heads(model, repeated_NT, windows, averaged),
        ablation=ablate(model, batches) if batches else None,
        neurons=neuron_examples(model, batches, num_neurons) if batches else None,
        embeddings=token_map(model, frequent_tokens(model, token_counts, num_used)),
    )


def inspect_text(model: Transformer, text: Text, averaged: Sequence[int] | None = None) -> TextInspection:
    """One forward pass for each analysis, and one for each of the words to explain."""
    tokens, positions = text.tokens, range(len(text.tokens))
    lens = logit_lens(model, tokens, top_k=LENS_TOKENS)
    words = [lens.top_tokens[-1, :, rank] for rank in range(min(CANDIDATES, LENS_TOKENS))]
    words.append(np.where(lens.targets == NO_TARGET, words[0], lens.targets))
    return TextInspection(
        text=text,
        attention=attention_patterns(model, tokens),
        lens=lens,
        losses=token_losses(model, tokens),
        candidates=tuple(
            logit_attribution(model, tokens, positions, word.tolist(), by="head", averaged=averaged) for word in words
        ),
    )


def frequent_tokens(model: Transformer, counts: np.ndarray | None, num_used: int | None = None) -> list[int]:
    """The ids for the map: the most frequent in training, without special ones, and at most `MAP_TOKENS`."""
    used = model.vocab_size if num_used is None else min(num_used, model.vocab_size)
    first = len(SPECIAL_TOKENS)
    order = np.arange(first, used)
    if counts is not None:
        order = order[np.argsort(-counts[first:used], kind="stable")]
        order = order[counts[order] > 0]
    return [int(token) for token in order[:MAP_TOKENS] if token != PAD]


Label = Callable[[int], str]


def page_data(inspection: Inspection, label: Label) -> dict[str, Any]:
    """All that the page's scripts read.

    Args:
        label: a token as it is printed.
    """
    labels: dict[int, str] = {}

    def name(token: Any) -> int:
        labels.setdefault(int(token), label(int(token)))
        return int(token)

    texts = [text_data(text, name) for text in inspection.texts]
    data = {
        "layers": len(inspection.heads.layers),
        "heads": len(inspection.heads.heads),
        "shown_head": list(shown_head(inspection)),
        "texts": texts,
        "neurons": None if inspection.neurons is None else neuron_data(inspection.neurons, name),
        "embeddings": embedding_data(inspection.embeddings, name),
    }
    return {**data, "labels": {str(token): shown for token, shown in sorted(labels.items())}}


def shown_head(inspection: Inspection) -> tuple[int, int]:
    """The head to show first: the one without which the loss is largest, or the first of the last layer."""
    if inspection.ablation is None:
        return len(inspection.heads.layers) - 1, 0
    strongest = inspection.ablation.order[0]
    return int(inspection.ablation.layers[strongest]), int(inspection.ablation.indices[strongest])


def text_data(text: TextInspection, name: Callable[[Any], int]) -> dict[str, Any]:
    """One text: the rows of patterns hold the sources up to their own position only."""
    lens, patterns = text.lens, text.attention.patterns
    positions = range(len(text.text.tokens))
    return {
        "source": text.text.source,
        "tokens": [name(token) for token in text.text.tokens],
        "patterns": [[[thousandths(head[t, : t + 1]) for t in positions] for head in layer] for layer in patterns],
        "losses": rounded(text.losses.losses, 2),
        "lens": {
            "stages": stage_labels(lens.stages),
            "tokens": [[[name(token) for token in cell] for cell in stage] for stage in lens.top_tokens],
            "probabilities": [[thousandths(cell) for cell in stage] for stage in lens.top_probabilities],
            "entropies": rounded(lens.entropies, 2),
            "divergences": rounded(np.maximum(lens.divergences, 0), 2),
            "decisions": lens.decision_stages.tolist(),
            "targets": [thousandths(stage) for stage in lens.target_probabilities],
            "ranks": rounded(lens.target_places, 1),
        },
        "parts": [part_label(part) for part, _ in text.candidates[0].parts("head")],
        "words": [
            {
                "tokens": [name(token) for token in word.targets],
                "probabilities": thousandths(word.probabilities),
                "logits": rounded(word.logits, 2),
                "added": rounded(np.stack([added for _, added in word.parts("head")], axis=1), 2),
                "sources": [rounded(word.sources[t, :, :, : t + 1].sum((0, 1)), 2) for t in positions],
            }
            for word in text.candidates
        ],
    }


def stage_labels(stages: tuple[str, ...]) -> list[str]:
    """`embed`, then `L0`, `L1` and so on for the stream after each block."""
    return ["embed", *(f"L{stage.split('.')[1]}" for stage in stages[1:])]


def part_label(part: Mapping[str, Any]) -> str:
    """`embed`, `position`, `L0H1`, `L0 MLP`."""
    formats = {"head": "L{layer}H{head}", "feedforward": "L{layer} MLP", "embed": "embed", "pos_embed": "position"}
    return formats[part["part"]].format(**part)


def neuron_data(result: NeuronExamples, name: Callable[[Any], int]) -> dict[str, Any]:
    """The neurons with their examples; of the windows only what is around an example."""
    layers = []
    for layer, neurons in enumerate(result.neurons):
        rows = []
        for row, neuron in enumerate(neurons):
            examples = []
            for rank, window in enumerate(result.windows[layer, row]):
                if window == NO_EXAMPLE:
                    continue
                around = result.around[layer, row, rank]
                here = np.flatnonzero(np.isfinite(around))
                first = int(result.positions[layer, row, rank]) - result.before
                largest = float(np.abs(result.activations[layer, row, 0])) or 1.0
                examples.append(
                    {
                        "activation": rounded(result.activations[layer, row, rank], 2),
                        "peak": int(result.before - here[0]),
                        "tokens": [name(result.tokens[window, first + at]) for at in here],
                        # Percent of the neuron's largest: a shade.
                        "shades": np.rint(around[here] / largest * 100).astype(int).tolist(),
                    }
                )
            promoted = [name(token) for token in result.promoted[layer, row]]
            rows.append({"neuron": int(neuron), "promoted": promoted, "examples": examples})
        layers.append(rows)
    return {"num_tokens": result.num_tokens, "layers": layers}


def embedding_data(result: TokenMap, name: Callable[[Any], int]) -> dict[str, Any]:
    return {
        "tokens": [name(token) for token in result.tokens],
        "points": rounded(result.points, 3),
        "variances": thousandths(result.variances),
        "neighbours": [[name(token) for token in row] for row in result.neighbours],
        "cosines": rounded(result.cosines, 2),
    }


def thousandths(values: Any) -> list[Any]:
    """Whole numbers of thousandths; None for NaN."""
    return [None if math.isnan(value) else round(value * 1000) for value in np.asarray(values, dtype=float).tolist()]


def rounded(values: Any, decimals: int) -> Any:
    """Nested lists of rounded numbers; None for what is not finite, which JSON does not have."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list):
        return [rounded(value, decimals) for value in values]
    number = float(values)
    if not math.isfinite(number):
        return None
    number = round(number, decimals)
    return int(number) if number.is_integer() else number


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: plain ASCII, and nothing that could end the element or open one."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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
        (
            name,
            receipt.check,
            f"{receipt.error:.0e}",
            f"{receipt.tolerance:.0e}",
            "holds" if receipt.holds else "FAILED",
        )
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


SCRIPTS = ("core.js", "dom.js", "text.js", "attention.js", "lens.js", "parts.js", "neurons.js", "map.js", "main.js")
"""In this order: each uses only what is before it."""


def build_page(
    inspection: Inspection, config: RunConfig, history: History, label: Label, about: Mapping[str, Any]
) -> str:
    """The page as text.

    All that comes from a corpus or a config is escaped where it stands in the HTML, and in the scripts' numbers it is
    plain ASCII; the scripts set it as text only. The page's own policy forbids it to load anything.

    Args:
        history: the run's losses; without any the page says so.
        label: a token as it is printed.
        about: `run`, `checkpoint`, `step`, `source`, `averaged_over`, `seed`, `weights_sha256`.
    """
    return fill(
        asset("template.html"),
        {
            "title": html.escape(f"Inside {about['run']}"),
            "run": html.escape(str(about["run"])),
            "style": asset("style.css"),
            "overview": overview(inspection, config, about),
            "facts": facts_table(inspection, config, about),
            "loss": loss_picture(history),
            "heads": head_table(inspection),
            "averaged_over": html.escape(str(about["averaged_over"])),
            "receipts": receipt_table(inspection),
            "data": script_json(page_data(inspection, label)),
            "script": f'(() => {{\n"use strict";\n{"".join(asset(name) for name in SCRIPTS)}start();\n}})();',
        },
    )


def asset(name: str) -> str:
    return (files("lumiere.report") / "page" / name).read_text(encoding="utf-8")


def fill(template: str, values: Mapping[str, str]) -> str:
    """`{{name}}` replaced, all at once, so that a value is never taken for a template."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
