"""The listener that writes `metrics.jsonl`."""

from typing import Any

from lumiere.persistence.metrics import MetricsWriter
from lumiere.training.events import EvaluationEvent, Event, StepEvent


class MetricsLog:
    """Turns events into lines. Names and units are those of docs/metrics.md."""

    def __init__(self, writer: MetricsWriter) -> None:
        self._writer = writer

    def __call__(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._writer.write(
                    progress(event)
                    | {
                        "loss": event.loss,
                        "learning_rate": event.learning_rate,
                        "grad_norm": event.grad_norm,
                        "tokens_per_second": round(event.tokens_per_second, 1),
                        "mfu": round(event.mfu, 4),
                    }
                )
            case EvaluationEvent(evaluation=evaluation):
                self._writer.write(
                    progress(event)
                    | {
                        "val_loss": evaluation.loss,
                        "val_perplexity": evaluation.perplexity,
                        "val_bits_per_byte": evaluation.bits_per_byte,
                    }
                )
            case _:
                pass


def progress(event: StepEvent | EvaluationEvent) -> dict[str, Any]:
    """What stands on every line."""
    return {
        "step": event.step,
        "epoch": round(event.epoch, 6),
        "tokens": event.tokens,
        "time": round(event.seconds, 3),
    }
