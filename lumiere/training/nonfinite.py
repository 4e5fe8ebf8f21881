"""What a training does about numbers that are not finite: they reach neither the weights nor a checkpoint.

Gradients that explode and are still finite are none of its business: clipping scales them down to the usual norm. Where
nothing is clipped, they move the weights so far that the next loss is not finite, or their norm overflows.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from lumiere.config.schema import TrainingConfig
from lumiere.data.batches import Windows, documents_at
from lumiere.errors import NonFiniteError
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.runs import Run
from lumiere.training.events import Event, WarningEvent
from lumiere.training.state import TrainingState

MAX_SKIPPED_IN_A_ROW = 10
"""Steps that `on_nonfinite: skip` leaves out one after the other; beyond that nothing is learnt any more."""
MAX_NAMES = 3  # of parameters in a message
MAX_DOCUMENTS = 32  # in a message: all of them with the usual batch size


class NonFiniteGuard:
    """Looks at the numbers of one training, and stops it, or skips a step, before they do harm.

    Args:
        precision: type of the matrix products.
        windows: of the training split.
        emit: is told of each step that is skipped.
    """

    def __init__(
        self,
        run: Run,
        state: TrainingState,
        settings: TrainingConfig,
        precision: torch.dtype,
        windows: Windows,
        emit: Callable[[Event], None],
    ) -> None:
        self._run = run
        self._state = state
        self._settings = settings
        self._precision = precision
        self._windows = windows
        self._emit = emit

    def check_step(self, loss: float, grad_norm: float) -> None:
        """Look at what a step came to, before it is counted; what is not finite has not been used for an update.

        Raises:
            NonFiniteError: if `loss` or `grad_norm` is not finite, and the step is not to be skipped.
        """
        state, settings = self._state, self._settings
        if is_finite(loss, grad_norm):
            state.skipped_in_a_row = 0
            return
        weights = nonfinite(dict(state.model.named_parameters()))
        gradients = nonfinite({n: p.grad for n, p in state.model.named_parameters() if p.grad is not None})
        state.model.zero_grad(set_to_none=True)
        documents = documents_at(state.step, self._windows, settings.batch_size, settings.seed)
        problem = f"step {state.step + 1:,}: the loss is {loss:.4g}, the norm of the gradients {grad_norm:.4g}"
        if weights:
            problem += f"; weights that were not finite before: {listed(weights, MAX_NAMES)}"
        elif gradients:
            problem += f"; gradients that are not finite: {listed(gradients, MAX_NAMES)}"
        problem += f"; documents of the batch: {listed(documents, MAX_DOCUMENTS)}"
        # No later step mends weights that are broken.
        if weights:
            raise self._error(problem)
        if settings.on_nonfinite == "stop":
            # By the record, which each save brings up to date.
            step = self._run.record.step or 0
            start = f"from the last good checkpoint, step {step}" if step else "from the start: nothing was saved yet"
            command = self._run.command("train", "--resume", self._run.id, "--set", "training.on_nonfinite=skip")
            raise self._error(problem, f"; {command} leaves out such steps and goes on {start}")
        if state.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise self._error(f"{problem}; the {MAX_SKIPPED_IN_A_ROW} steps before were skipped already")
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        self._emit(WarningEvent(state.step + 1, f"{problem}; its update is skipped"))

    def check_evaluation(self, loss: float) -> None:
        """Look at a validation loss, before it counts for anything.

        Raises:
            NonFiniteError: if it is not finite.
        """
        if not is_finite(loss):
            raise self._error(f"step {self._state.step:,}: the validation loss is {loss}")

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Look at what is about to be saved.

        Raises:
            NonFiniteError: if weights, or the optimizers' averages, are not finite.
        """
        if broken := nonfinite(checkpoint.model | checkpoint.optimizer):
            names = listed(broken, MAX_NAMES)
            raise self._error(f"step {self._state.step:,}: no longer finite, and not saved: {names}")

    def _error(self, problem: str, another_way: str = "") -> NonFiniteError:
        """An error that says what may have led to the problem, and how to go on."""
        settings = self._settings
        rates = {"learning_rate": settings.learning_rate}
        if settings.optimizer == "muon":
            rates["muon_learning_rate"] = settings.muon_learning_rate
        causes = [f"training.{name}={rate:g} is too high" for name, rate in rates.items()]
        if not settings.warmup_steps:
            causes.append("there is no warm-up (training.warmup_steps=0)")
        if settings.gradient_clip_norm is None:
            causes.append("nothing is clipped (training.gradient_clip_norm is empty)")
        if self._precision == torch.bfloat16:
            causes.append("bfloat16 is too coarse (training.precision=float32 is not)")
        return NonFiniteError(
            problem,
            f"likely causes: {', '.join(causes)}; train anew with --set training.learning_rate="
            f"{settings.learning_rate / 3:.1g}{another_way}",
        )


def is_finite(*numbers: float) -> bool:
    """Whether none of them is NaN or infinite."""
    return all(map(math.isfinite, numbers))


def nonfinite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the tensors with a NaN or an infinity in them."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def listed(items: Sequence[object], limit: int) -> str:
    """The first of the items, and how many more there are."""
    rest = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + rest
