"""The numbers of the report page as one JSON object, rounded to what the page shows.

Shares and probabilities are whole numbers of thousandths, logits have two decimals: the page stays small, and what it
shows is what Python printed.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lumiere.interpret.neurons import NO_EXAMPLE, NeuronExamples, TokenMap
from lumiere.report.inspection import Inspection, TextInspection

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
