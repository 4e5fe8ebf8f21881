"""Everything that changes while training, saved and restored whole."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lumiere.config.schema import RunConfig, TrainingConfig
from lumiere.errors import CheckpointError
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.training.optim import Optimizers, WeightAverage
from lumiere.training.parallel import load_weights

COUNTERS = (
    "step",
    "tokens",
    "seconds",
    "best_loss",
    "best_step",
    "stopping_loss",
    "epochs_without_improvement",
    "stop_reason",
    "skipped_steps",
    "skipped_in_a_row",
)
NEWER_COUNTERS = {"skipped_steps": 0, "skipped_in_a_row": 0}
"""Where those stand that the checkpoints of the first version do not have."""
FRACTIONAL = {"seconds", "best_loss", "stopping_loss"}
OPTIONAL = {"best_loss", "best_step", "stopping_loss", "stop_reason"}
STOP_REASONS = ("max_steps", "max_epochs", "patience")

NUMERICS = 2
"""Goes up when a change of Lumiere alters the bits of a training step. A checkpoint records the one that it was trained
with; those that record none were trained with 1."""

TRAINED = "trained."
"""Before the names, among the optimizer's tensors, of the weights that training goes on with where the model in a
checkpoint is their average."""


@dataclass
class TrainingState:
    """The model, its optimizers, the average of its weights, the random generators of torch, and the counters.

    Attributes:
        average: of the weights (None: nothing is averaged).
        step: updates so far, with those that were skipped.
        tokens: targets trained on so far.
        seconds: of training so far.
        best_loss: lowest validation loss, which `best` goes by (None: not evaluated yet).
        stopping_loss: validation loss that the next epoch must beat by `stopping_threshold`.
        epochs_without_improvement: ends of epochs since it was last beaten.
        stop_reason: why training is over (None: it is not).
        skipped_steps: steps without an update, because the loss or the gradients were not finite.
        skipped_in_a_row: how many of them were the last ones.
    """

    model: Transformer
    optimizers: Optimizers
    average: WeightAverage | None = None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    stopping_loss: float | None = None
    epochs_without_improvement: int = 0
    stop_reason: str | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def create(cls, config: RunConfig, device: torch.device, precision: torch.dtype = torch.float32) -> "TrainingState":
        """A fresh state of a fresh model in one process."""
        return cls.around(new_model(config).to(device), config.training, precision)

    @classmethod
    def around(
        cls, model: Transformer, settings: TrainingConfig, precision: torch.dtype = torch.float32
    ) -> "TrainingState":
        """A fresh state of a model whose weights are where, and shared out as, they are to be trained."""
        average = None if settings.ema_decay is None else WeightAverage(model, settings.ema_decay)
        return cls(model, Optimizers(model, settings, precision), average)

    def update(self, factor: float) -> None:
        """Move the weights, and their average, by the gradients.

        Args:
            factor: share of the peak learning rates.
        """
        self.optimizers.step(factor)
        if self.average is not None:
            self.average.update(self.step + 1)

    @contextmanager
    def averaged_model(self) -> Iterator[Transformer]:
        """Inside of it, the model as it is evaluated and saved: with the average of its weights, where there is one."""
        if self.average is None:
            yield self.model
        else:
            with self.average.applied():
                yield self.model

    def record_evaluation(self, loss: float) -> bool:
        """Take note of a validation loss, and say whether it is the best so far."""
        if not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            return False
        self.best_loss, self.best_step = loss, self.step
        return True

    def record_epoch(self, loss: float, threshold: float) -> None:
        """Take note of the validation loss at the end of an epoch, which patience counts by."""
        improved = self.stopping_loss is None or loss < self.stopping_loss - threshold
        if improved and math.isfinite(loss):
            self.stopping_loss, self.epochs_without_improvement = loss, 0
        else:
            self.epochs_without_improvement += 1

    def to_checkpoint(self, about: dict[str, Any]) -> Checkpoint:
        """The whole state; `about` is what else the file should say."""
        rng = {"cpu": torch.get_rng_state()}
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(device)
        counters = {name: getattr(self, name) for name in COUNTERS}
        model, optimizer = self.model.state_dict(), self.optimizers.state_tensors()
        if self.average is not None:
            optimizer |= {TRAINED + name: weight for name, weight in model.items()}
            model = self.average.tensors()
        return Checkpoint(model, optimizer, rng, about | counters)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a whole state.

        Raises:
            CheckpointError: if it holds weights only, or belongs to another model.
        """
        if not checkpoint.rng:
            raise CheckpointError("this checkpoint holds weights only", "resume from latest, previous or best")
        trained = {
            name.removeprefix(TRAINED): weight
            for name, weight in checkpoint.optimizer.items()
            if name.startswith(TRAINED)
        }
        if bool(trained) != (self.average is not None):
            raise misfit()
        try:
            load_weights(self.model, checkpoint.model)
            self.optimizers.load_state_tensors(checkpoint.optimizer)
            torch.set_rng_state(checkpoint.rng["cpu"])
            if self.average is not None:
                self.average.load(checkpoint.model)
                load_weights(self.model, trained)
            metadata = NEWER_COUNTERS | checkpoint.metadata
            counters = {name: metadata[name] for name in COUNTERS}
            device = next(self.model.parameters()).device
            # A run that was trained on a CPU so far draws on from its seed.
            if device.type == "cuda" and "cuda" in checkpoint.rng:
                torch.cuda.set_rng_state(checkpoint.rng["cuda"], device)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            # Torch's own message is a page of parameter names.
            raise misfit() from error
        if not all(is_counter(name, value) for name, value in counters.items()):
            raise misfit()
        for name, value in counters.items():
            setattr(self, name, value)


def new_model(config: RunConfig) -> Transformer:
    """The model at step 0, on the CPU, so that the weights depend on the seed and not on the device."""
    torch.manual_seed(config.training.seed)
    return build_model(config)


def is_counter(name: str, value: object) -> bool:
    """Whether the counter `name` can stand at `value`."""
    if value is None:
        return name in OPTIONAL
    if name == "stop_reason":
        return value in STOP_REASONS
    kinds = int | float if name in FRACTIONAL else int
    return isinstance(value, kinds) and not isinstance(value, bool) and value >= 0


def misfit() -> CheckpointError:
    """What to raise where a checkpoint and the config that it is to go on with do not belong together."""
    return CheckpointError(
        "the checkpoint does not fit the run",
        "undo the changes to its config.yaml, which describes the run as it was trained",
    )
