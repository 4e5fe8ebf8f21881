"""What a training reports while it runs. The metrics file and the progress bar are two callbacks of one stream."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lumiere.evaluation.loss import Evaluation


@dataclass(frozen=True)
class StartEvent:
    """Training begins, or goes on, at `step`.

    Attributes:
        peak_flops: FLOP/s that the device reaches in matrix products of that precision, as measured.
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


@dataclass(frozen=True)
class StepEvent:
    """A step whose metrics are due, every `log_interval` steps.

    Attributes:
        step: updates so far.
        epoch: passes over the training windows so far, with a fraction.
        tokens: targets trained on so far; padding is none.
        seconds: of training so far, evaluating and saving left out.
        loss: of this step's batch, in nats a token.
        learning_rate: of AdamW in this step.
        grad_norm: of the gradients, before clipping.
        tokens_per_second: since the step before that was reported.
        mfu: model FLOPs utilisation in the same time: the FLOPs that those tokens take by `flops_per_token`, as a share
            of the measured peak (Chowdhery et al. 2022, "PaLM", appendix B). Padding is computed too, and counts as
            lost.
    """

    step: int
    epoch: float
    tokens: int
    seconds: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    mfu: float


@dataclass(frozen=True)
class EvaluationEvent:
    """The validation split was scored."""

    step: int
    epoch: float
    tokens: int
    seconds: float
    evaluation: "Evaluation"
    is_best: bool


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint was written."""

    step: int
    name: str


@dataclass(frozen=True)
class WarningEvent:
    """Something did not go as asked, and training goes on another way."""

    step: int
    message: str


Event = StartEvent | StepEvent | EvaluationEvent | CheckpointEvent | WarningEvent
Callback = Callable[[Event], None]
