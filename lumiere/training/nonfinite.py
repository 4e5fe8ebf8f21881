"""Detect NaN or infinity in loss, gradients and weights; stop, or skip the step.

Gradients that explode but are still finite are left to clipping. Without clipping they move the weights so far that the
next loss is not finite, or their norm overflows.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from lumiere.data.batches import documents_at
from lumiere.errors import NonFiniteError
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.runs import Run
from lumiere.training.events import Callback, WarningEvent
from lumiere.training.setup import TrainingSetup
from lumiere.training.state import TrainingState

MAX_SKIPPED_IN_A_ROW = 10
"""Consecutive steps that `on_nonfinite: skip` skips; after more than these nothing is learned any more."""
MAX_NAMES = 3  # parameters in a message
MAX_DOCUMENTS = 32  # documents in a message: all of them at the usual batch size


class NonFiniteGuard:
    """Checks the numbers of one training run before they do harm.

    Args:
        emit: Receives a warning for each step that is skipped.
    """

    def __init__(self, setup: TrainingSetup, run: Run, state: TrainingState, emit: Callback) -> None:
        self.setup = setup
        self.settings = setup.config.training
        self.run = run
        self.state = state
        self.emit = emit

    def check_step(self, loss: float, grad_norm: float) -> None:
        """Check a step before it is counted. Non-finite numbers have not been used for an update.

        Raises:
            NonFiniteError: `loss` or `grad_norm` is not finite, and the step must not be skipped.
        """
        state, settings = self.state, self.settings
        if is_finite(loss, grad_norm):
            state.skipped_in_a_row = 0
            return
        weights = nonfinite(dict(state.model.named_parameters()))
        gradients = nonfinite({n: p.grad for n, p in state.model.named_parameters() if p.grad is not None})
        state.model.zero_grad(set_to_none=True)
        windows = self.setup.corpus.windows("train", self.setup.config)
        documents = documents_at(state.step, windows, settings.batch_size, settings.seed)
        problem = f"step {state.step + 1:,}: the loss is {loss:.4g}, the norm of the gradients {grad_norm:.4g}"
        if weights:
            problem += f"; weights that were not finite before: {listed(weights, MAX_NAMES)}"
        elif gradients:
            problem += f"; gradients that are not finite: {listed(gradients, MAX_NAMES)}"
        problem += f"; documents of the batch: {listed(documents, MAX_DOCUMENTS)}"
        # No later step repairs broken weights.
        if weights:
            raise self._error(problem)
        if settings.on_nonfinite == "stop":
            # Every save updates the record.
            step = self.run.record.step or 0
            start = f"from the last good checkpoint, step {step}" if step else "from the start: nothing was saved yet"
            command = self.run.command("train", "--resume", self.run.id, "--set", "training.on_nonfinite=skip")
            raise self._error(problem, f"; {command} resumes {start} and skips such steps")
        if state.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise self._error(f"{problem}; the {MAX_SKIPPED_IN_A_ROW} steps before were skipped already")
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        self.emit(WarningEvent(state.step + 1, f"{problem}; its update is skipped"))

    def check_evaluation(self, loss: float) -> None:
        """Check a validation loss before it is recorded.

        Raises:
            NonFiniteError: It is not finite.
        """
        if not is_finite(loss):
            raise self._error(f"step {self.state.step:,}: the validation loss is {loss}")

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Check a checkpoint before it is saved.

        Raises:
            NonFiniteError: Weights or optimizer states are not finite.
        """
        if broken := nonfinite(checkpoint.model | checkpoint.optimizer):
            names = listed(broken, MAX_NAMES)
            raise self._error(f"step {self.state.step:,}: no longer finite, and not saved: {names}")

    def _error(self, problem: str, another_way: str = "") -> NonFiniteError:
        """Return an error that names likely causes and ways to continue."""
        settings = self.settings
        rates = {"learning_rate": settings.learning_rate}
        if settings.optimizer == "muon":
            rates["muon_learning_rate"] = settings.muon_learning_rate
        causes = [f"training.{name}={rate:g} is too high" for name, rate in rates.items()]
        if not settings.warmup_steps:
            causes.append("there is no warm-up (training.warmup_steps=0)")
        if settings.gradient_clip_norm is None:
            causes.append("nothing is clipped (training.gradient_clip_norm is empty)")
        if self.setup.precision == torch.bfloat16:
            causes.append("bfloat16 is too coarse (training.precision=float32 is not)")
        return NonFiniteError(
            problem,
            f"likely causes: {', '.join(causes)}; retry with --set training.learning_rate="
            f"{settings.learning_rate / 3:.1g}{another_way}",
        )


def is_finite(*numbers: float) -> bool:
    """Return whether none of the numbers is NaN or infinite."""
    return all(map(math.isfinite, numbers))


def nonfinite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that contain NaN or infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def listed(items: Sequence[object], limit: int) -> str:
    """Join the first items, and the number of the others."""
    rest = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + rest
