"""What the loggers call the figures of an event; docs/metrics.md has the names in `metrics.jsonl`."""

from lumiere.training.events import EvaluationEvent, StepEvent


def figures(event: StepEvent | EvaluationEvent) -> dict[str, float]:
    """The figures of an event by tag."""
    if isinstance(event, StepEvent):
        return {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/tokens_per_second": event.tokens_per_second,
            "train/mfu": event.mfu,
        }
    return {
        "val/loss": event.evaluation.loss,
        "val/perplexity": event.evaluation.perplexity,
        "val/bits_per_byte": event.evaluation.bits_per_byte,
    }
