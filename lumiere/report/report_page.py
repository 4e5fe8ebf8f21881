"""The report page: all analyses of one model on a self-contained, interactive HTML page.

Shapes: T position, C candidate token, L layer, H head.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.config.schema import RunConfig
from lumiere.data.batches import Batch
from lumiere.evaluation.scoring import half_width
from lumiere.interpret.ablation import Ablations, ablate
from lumiere.interpret.attention import AttentionPatterns, attention_patterns
from lumiere.interpret.head_scores import HeadScores, TextWindows, score_heads
from lumiere.interpret.logit_attribution import LogitAttribution, logit_attribution
from lumiere.interpret.logit_lens import NO_TARGET, LogitLens, logit_lens
from lumiere.interpret.neurons import NO_EXAMPLE, NeuronExamples, TokenMap, neuron_examples, token_map
from lumiere.interpret.result import Result
from lumiere.interpret.summary import ModelSummary, summarize
from lumiere.interpret.token_losses import TokenLosses, token_losses
from lumiere.models.transformer import Transformer
from lumiere.persistence.metrics import History
from lumiere.persistence.record import RunRecord
from lumiere.report.figures.bars import part_name
from lumiere.report.figures.heat_maps import Label
from lumiere.report.model_card import base_name, corpus_name
from lumiere.report.rendering import Scale, plural, render_html, signed, svg_path
from lumiere.training.costs import count_parameters

LENS_TOKENS = CANDIDATES = 3
"""Most probable next tokens that are shown, and explained, at each position."""
MAP_TOKENS = 300
MAX_NEURONS = 1024
"""Of all layers together, so that the page stays small."""
SCRIPTS = ("core.js", "dom.js", "text.js", "attention.js", "lens.js", "parts.js", "neurons.js", "map.js", "main.js")
"""Each uses only those before it."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 44, 708, 20, 264
"""Size of the loss chart, and the edges of its plot, in SVG units."""


@dataclass(frozen=True)
class Text:
    """A text to inspect.

    Attributes:
        tokens: (T,) at least two ids.
        source: origin of the text, in words.
    """

    tokens: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class TextInspection:
    """Analyses of one text.

    Attributes:
        candidates: C attributions of all positions: of the most probable next tokens in order, then of the token that
            follows in the text; at the last position, of the most probable token again.
    """

    text: Text
    attention: AttentionPatterns
    lens: LogitLens
    losses: TokenLosses
    candidates: tuple[LogitAttribution, ...]


@dataclass(frozen=True)
class Inspection:
    """Analyses of a model, on texts and on the validation split.

    Attributes:
        texts: at least one.
        ablation: of each head; None without validation text, like `neurons`.
    """

    summary: ModelSummary
    texts: tuple[TextInspection, ...]
    heads: HeadScores
    ablation: Ablations | None
    neurons: NeuronExamples | None
    embeddings: TokenMap

    def results(self) -> list[tuple[str, Result]]:
        """All results with the names of the commands that compute them."""
        named: dict[str, Result | None] = {
            "summary": self.summary,
            "heads": self.heads,
            "ablate": self.ablation,
            "neurons": self.neurons,
            "embeddings": self.embeddings,
        }
        for number, text in enumerate(self.texts, 1):
            named |= {
                f"attention, text {number}": text.attention,
                f"lens, text {number}": text.lens,
                f"tokens, text {number}": text.losses,
                **{f"logits, text {number}, word {rank}": found for rank, found in enumerate(text.candidates, 1)},
            }
        return [(name, result) for name, result in named.items() if result is not None]


def inspect_model(
    model: Transformer,
    texts: Sequence[Text],
    repeated_NT: torch.Tensor,
    batches: Sequence[Batch] = (),
    windows: TextWindows | None = None,
    token_counts: np.ndarray | None = None,
    text_ids: Sequence[int] | None = None,
    averaged: Sequence[int] | None = None,
) -> Inspection:
    """Run every analysis that the page shows.

    Args:
        model: in evaluation mode.
        texts: each of 2 to `context_size` tokens.
        repeated_NT: repeated random tokens, for the head scores.
        batches: validation windows. Without any, ablation and neurons are left out; neurons also where the model has
            none.
        windows: of the validation split, with their documents, for the in-context score and natural repeats.
        token_counts: count of each token in the training split, for the map. Default: the first tokens.
        text_ids: ids of tokens that stand for text, for the map. Default: all.
        averaged: tokens over which centered logits and copying are averaged. Default: all.
    """
    num_neurons = min(model.d_ff, MAX_NEURONS // model.num_layers) if model.settings.feedforward != "none" else 0
    return Inspection(
        summary=summarize(model, batches, token_counts),
        texts=tuple(inspect_text(model, text, averaged) for text in texts),
        heads=score_heads(model, repeated_NT, windows, averaged),
        ablation=ablate(model, batches) if batches else None,
        neurons=neuron_examples(model, batches, num_neurons) if batches and num_neurons else None,
        embeddings=token_map(model, frequent_tokens(text_ids or range(model.vocab_size), token_counts)),
    )


def inspect_text(model: Transformer, text: Text, averaged: Sequence[int] | None = None) -> TextInspection:
    tokens, positions = text.tokens, range(len(text.tokens))
    lens = logit_lens(model, tokens, top_k=LENS_TOKENS)
    candidates = [lens.top_tokens[-1, :, rank] for rank in range(CANDIDATES)]
    candidates.append(np.where(lens.targets == NO_TARGET, candidates[0], lens.targets))
    return TextInspection(
        text=text,
        attention=attention_patterns(model, tokens),
        lens=lens,
        losses=token_losses(model, tokens),
        candidates=tuple(
            logit_attribution(model, tokens, positions, tokens_T.tolist(), by="head", averaged=averaged)
            for tokens_T in candidates
        ),
    )


def frequent_tokens(text_ids: Sequence[int], counts: np.ndarray | None) -> list[int]:
    """The ids for the map: the `MAP_TOKENS` most frequent in training, without special tokens."""
    order = np.array(text_ids)
    if counts is not None:
        order = order[np.argsort(-counts[order], kind="stable")]
        order = order[counts[order] > 0]
    return order[:MAP_TOKENS].tolist()


def build_page(
    inspection: Inspection,
    config: RunConfig,
    history: History,
    label: Label,
    provenance: Mapping[str, Any],
    origins: Sequence[str] = (),
) -> str:
    """Render the page.

    Values from corpora and configs are escaped in the HTML and plain ASCII in the scripts' JSON, and scripts insert
    them as text only. The page's content security policy forbids it to load anything.

    Args:
        history: losses of the run; may be empty.
        label: returns a token as printable text.
        provenance: `run`, `checkpoint`, `step`, `source`, `averaged_over`, `seed`, `weights_sha256`.
        origins: As `origins` returns.
    """
    corpus = corpus_name(config.dataset)
    return render_html(
        "report.html.j2",
        about=provenance,
        origins=origins,
        config=config,
        corpus=corpus,
        source=str(provenance["source"]).replace(config.dataset.name, corpus),
        parameters=count_parameters(config),
        inspection=inspection,
        chart=loss_chart(history),
        text_induction=text_induction(inspection.heads),
        gains=repeat_gains(inspection.heads),
        receipts=[(name, receipt) for name, result in inspection.results() for receipt in result.receipts],
        data=page_data(inspection, label),
        scripts=SCRIPTS,
    )


def origins(record: RunRecord) -> list[str]:
    """Say in sentences where weights come from that were not trained from scratch in this run."""
    found = []
    if record.status == "imported":
        place = base_name(str(record.source.get("path", "unknown")))
        compared = "was" if record.source.get("verified") else "was not"
        found = [f"The weights were imported from {place}; the computation {compared} compared with transformers."]
    for number, parent in enumerate(record.ancestors):
        corpus = parent.get("dataset")
        found.append(
            f"{'That run' if number else 'Training'} started from checkpoint {parent.get('checkpoint', 'unknown')} "
            f"(step {parent.get('step', 'unknown')}) of run {parent.get('run', 'unknown')}"
            + (f", trained on {base_name(corpus)}." if isinstance(corpus, str) else ".")
        )
    return found


def loss_chart(history: History) -> dict[str, Any] | None:
    """What the template needs to draw training and validation loss; None without losses."""
    points = [*history.training, *history.validation]
    if not points:
        return None
    last = max(point.step for point in points) or 1
    low = math.floor(min(point.loss for point in points))
    high = max(math.ceil(max(point.loss for point in points)), low + 1)
    x, y = Scale(0, last, LEFT, RIGHT), Scale(low, high, BOTTOM, TOP)
    best = min(history.validation, key=lambda point: point.loss, default=None)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "grid": [(y(loss), loss) for loss in range(low, high + 1, max(1, (high - low) // 6))],
        "ticks": [(x(step), step, anchor) for step, anchor in ((0, "start"), (last // 2, "middle"), (last, "end"))],
        "curves": {
            "training": svg_path((x(point.step), y(point.loss)) for point in history.training),
            "validation": svg_path((x(point.step), y(point.loss)) for point in history.validation),
        },
        "best": "" if best is None else f" The best validation loss is {best.loss:.3f}, at step {best.step:,}.",
    }


def text_induction(heads: HeadScores) -> dict[str, Any] | None:
    """(L, H) induction scores at repeated names of the validation split, and that of uniform attention."""
    if heads.text_scores is None or not heads.text_repeats:
        return None
    index = heads.score_names.index("induction")
    uniform = math.nan if heads.text_uniform is None else heads.text_uniform[index]
    return {"scores": heads.text_scores[..., index], "uniform": uniform}


def repeat_gains(heads: HeadScores) -> list[str]:
    """How much easier repeated tokens are to predict, in words: random tokens, and names in text."""
    found = []
    if not math.isnan(heads.repeat_gap):
        found.append(gain("Random tokens", float(heads.repeat_gap), float(heads.repeat_gap_error), len(heads.tokens)))
    if heads.text_repeats:
        documents = heads.text_documents or 0
        counts = f"{plural(heads.text_repeats, 'repeat')} in {plural(documents, 'document')}"
        what = f"Names in the validation split ({counts})"
        found.append(gain(what, float(heads.text_gap), float(heads.text_gap_error), documents))
    return found


def gain(what: str, gap: float, error: float, count: int) -> str:
    """Say whether tokens are easier to predict when repeated; `count` texts are behind the standard error."""
    if count < 2:
        return f"{what}: {signed(gap, 2)} nats easier when repeated; a single text has no standard error."
    verdict = "easier" if gap > half_width(count) * error else "not easier"
    return f"{what} are {verdict} to predict when repeated ({signed(gap, 2)} ± {error:.2f} nats)."


def page_data(inspection: Inspection, label: Label) -> dict[str, Any]:
    """Return all numbers that the scripts read, rounded to what the page shows.

    Probabilities are integers in thousandths and logits have two decimals, which keeps the page small.
    """
    labels: dict[int, str] = {}

    def name(token: Any) -> int:
        labels.setdefault(int(token), label(int(token)))
        return int(token)

    data = {
        "layers": len(inspection.heads.layers),
        "heads": len(inspection.heads.heads),
        "shown_head": shown_head(inspection),
        "texts": [text_data(text, name) for text in inspection.texts],
        "neurons": None if inspection.neurons is None else neuron_data(inspection.neurons, name),
        "embeddings": embedding_data(inspection.embeddings, name),
    }
    return {**data, "labels": dict(sorted(labels.items()))}


def shown_head(inspection: Inspection) -> list[int]:
    """The head to show first: the one whose ablation hurts most, or the first of the last layer."""
    if inspection.ablation is None:
        return [len(inspection.heads.layers) - 1, 0]
    strongest = inspection.ablation.order[0]
    return [int(inspection.ablation.layers[strongest]), int(inspection.ablation.indices[strongest])]


def text_data(text: TextInspection, name: Callable[[Any], int]) -> dict[str, Any]:
    """One text. Rows of patterns hold the sources up to their own position only."""
    lens, positions = text.lens, range(len(text.text.tokens))
    return {
        "source": text.text.source,
        "tokens": [name(token) for token in text.text.tokens],
        "patterns": [
            [[thousandths(head[t, : t + 1]) for t in positions] for head in layer] for layer in text.attention.patterns
        ],
        "losses": rounded(text.losses.losses, 2),
        "lens": {
            # The stream before block 0, then after each block.
            "stages": ["embed", *(f"L{stage.split('.')[1]}" for stage in lens.stages[1:])],
            "tokens": [[[name(token) for token in cell] for cell in stage] for stage in lens.top_tokens],
            "probabilities": thousandths(lens.top_probabilities),
            "entropies": rounded(lens.entropies, 2),
            "divergences": rounded(np.maximum(lens.divergences, 0), 2),
            "decisions": lens.decision_stages.tolist(),
            "targets": thousandths(lens.target_probabilities),
            "ranks": rounded(lens.target_places, 1),
        },
        "parts": [part_name(part).replace("feed-forward", "MLP") for part, _ in text.candidates[0].parts("head")],
        "words": [
            {
                "tokens": [name(token) for token in found.targets],
                "probabilities": thousandths(found.probabilities),
                "logits": rounded(found.logits, 2),
                "added": rounded(np.stack([added for _, added in found.parts("head")], axis=1), 2),
                "sources": [rounded(found.sources[t, :, :, : t + 1].sum((0, 1)), 2) for t in positions],
            }
            for found in text.candidates
        ],
    }


def neuron_data(result: NeuronExamples, name: Callable[[Any], int]) -> dict[str, Any]:
    """The neurons with the text around each example; shades are percentages of the neuron's largest activation."""

    def example(layer: int, row: int, rank: int) -> dict[str, Any]:
        around = result.around[layer, row, rank]
        here = np.flatnonzero(np.isfinite(around))
        first = int(result.positions[layer, row, rank]) - result.before
        largest = float(np.abs(result.activations[layer, row, 0])) or 1.0
        window = result.windows[layer, row, rank]
        return {
            "activation": rounded(result.activations[layer, row, rank], 2),
            "peak": int(result.before - here[0]),
            "tokens": [name(result.tokens[window, first + at]) for at in here],
            "shades": np.rint(around[here] / largest * 100).astype(int).tolist(),
        }

    layers = [
        [
            {
                "neuron": int(neuron),
                "promoted": [name(token) for token in result.promoted[layer, row]],
                "examples": [
                    example(layer, row, rank)
                    for rank, window in enumerate(result.windows[layer, row])
                    if window != NO_EXAMPLE
                ],
            }
            for row, neuron in enumerate(neurons)
        ]
        for layer, neurons in enumerate(result.neurons)
    ]
    return {"num_tokens": result.num_tokens, "layers": layers}


def embedding_data(result: TokenMap, name: Callable[[Any], int]) -> dict[str, Any]:
    return {
        "tokens": [name(token) for token in result.tokens],
        "points": rounded(result.points, 3),
        "variances": thousandths(result.variances),
        "neighbors": [[name(token) for token in row] for row in result.neighbours],
        "cosines": rounded(result.cosines, 2),
    }


def thousandths(values: Any) -> Any:
    """Nested lists of integers, in thousandths; None for NaN."""
    return nested(values, lambda value: round(value * 1000))


def rounded(values: Any, decimals: int) -> Any:
    """Nested lists of rounded numbers; None for infinity and NaN, which JSON does not have."""

    def short(value: float) -> float:
        number = round(float(value), decimals)
        return int(number) if number.is_integer() else number

    return nested(values, short)


def nested(values: Any, convert: Callable[[float], float]) -> Any:
    """Convert the finite numbers of an array or of nested lists; None for others."""
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if isinstance(values, list):
        return [nested(value, convert) for value in values]
    return convert(values) if math.isfinite(values) else None
