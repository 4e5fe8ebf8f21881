"""Events of a training run. The metrics file, the progress bar and the loggers are callbacks of one stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lumiere.evaluation.loss import Evaluation


@dataclass(frozen=True)
class StartEvent:
    """Training starts or resumes at `step`.

    Attributes:
        peak_flops: Measured FLOP/s of the device in matrix products of that precision.
        frozen: The parts that are not trained, as text; empty if there are none.
    """

    run_name: str
    step: int
    total_steps: int
    steps_per_epoch: int
    num_parameters: int
    num_windows: int
    device: str
    precision: str
    peak_flops: float
    frozen: str = ""


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        step: Updates so far.
        epoch: Passes over the training windows so far, with a fraction.
        tokens: Targets trained on so far, without padding.
        seconds: Training time so far, without evaluation and saving.
    """

    step: int
    epoch: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class StepEvent(Progress):
    """Metrics of a step, every `log_interval` steps.

    Attributes:
        loss: Of this step's batch, in nats per token.
        learning_rate: Of AdamW in this step.
        grad_norm: Of the gradients, before clipping.
        tokens_per_second: Since the last reported step.
        mfu: Model FLOPs utilization over the same time: the FLOPs of those tokens by `flops_per_token`, as a fraction
            of the measured peak (Chowdhery et al. 2022, "PaLM", appendix B). Padding is computed but not counted.
    """

    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    mfu: float


@dataclass(frozen=True)
class EvaluationEvent(Progress):
    """The validation split was scored."""

    evaluation: "Evaluation"
    is_best: bool


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint was written."""

    step: int
    name: str


@dataclass(frozen=True)
class WarningEvent:
    """Something did not work as configured; training continues in another way."""

    step: int
    message: str


Event = StartEvent | StepEvent | EvaluationEvent | CheckpointEvent | WarningEvent
Callback = Callable[[Event], None]


def to_all(callbacks: Sequence[Callback]) -> Callback:
    """Return a callback that passes each event to all of these, in order."""

    def emit(event: Event) -> None:
        for callback in callbacks:
            callback(event)

    return emit
