"""The YAML header of a model card, as the Hugging Face Hub reads it (hub-docs, `modelcard.md`)."""

import math
from typing import Any

import yaml

from lumiere.report.card_facts import CardFacts, known_language
from lumiere.report.card_training import corpus_name
from lumiere.report.markdown import printable

# The Hub's names of the metrics that it knows, and ours of the others.
METRICS = {
    "loss": ("loss", "Loss, nats a token"),
    "perplexity": ("perplexity", "Perplexity"),
    "bits_per_byte": ("bits_per_byte", "Bits per byte"),
    "word_perplexity": ("word_perplexity", "Word perplexity"),
    "mean_batch_loss": ("mean_batch_loss", "Mean batch loss"),
    "mean_batch_perplexity": ("mean_batch_perplexity", "Mean batch perplexity"),
}


def header(facts: CardFacts) -> str:
    """The header without its two lines of dashes. A key whose value is not known is left out."""
    config = facts.config
    language = known_language(config.dataset)
    values: dict[str, Any] = {
        "language": [language] if language else None,
        "license": "mit",
        "library_name": "lumiere",
        "pipeline_tag": "text-generation",
        "tags": ["lumiere", "gpt", "transformer", "small-language-model", "interpretability"],
        "datasets": [config.dataset.name] if facts.on_hub else None,
        "model-index": [{"name": facts.run_name, "results": [result(facts)]}],
    }
    kept = {key: value for key, value in values.items() if value is not None}
    # On one line each: a folded text could bring a line of dashes to the start of a line, where the header would end.
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=math.inf)


def result(facts: CardFacts) -> dict[str, Any]:
    """The evaluation in the form of the Hub's `model-index`."""
    settings = facts.config.dataset
    about = {"type": printable(corpus_name(settings)), "name": printable(corpus_name(settings))}
    if settings.subset:
        about["config"] = printable(settings.subset)
    figures = {name: getattr(facts.evaluation, name) for name in METRICS}
    metrics = [
        {"type": kind, "value": round(figures[name], 6), "name": title}
        for name, (kind, title) in METRICS.items()
        if math.isfinite(figures[name])
    ]
    task = {"type": "text-generation", "name": "Text Generation"}
    return {"task": task, "dataset": about | {"split": "validation"}, "metrics": metrics}
