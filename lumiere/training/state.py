"""Everything that changes while training, saved and restored whole."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field, TypeAdapter

from lumiere.config.schema import RunConfig, TrainingConfig
from lumiere.errors import CheckpointError
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.checkpoint import TRAINED, Checkpoint
from lumiere.training.freezing import freeze
from lumiere.training.optim import Optimizers, WeightAverage
from lumiere.training.parallel import load_weights

Count = Annotated[int, Field(strict=True, ge=0)]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
StopReason = Literal["max_steps", "max_epochs", "patience"]
STOP_REASONS = get_args(StopReason)

NUMERICS = 2
"""Version of the arithmetic of a training step, recorded in each checkpoint (1 if absent). Raise it with every change
that alters the bits of a step."""


@dataclass(kw_only=True)
class Counters:
    """The numbers of a training state, which checkpoints keep in their metadata.

    Attributes:
        step: Steps so far, including skipped ones.
        tokens: Targets trained on so far.
        seconds: Training time so far.
        best_loss: Lowest validation loss, that of `best`. None: not evaluated yet.
        stopping_loss: Validation loss that the next epoch must beat by `stopping_threshold`.
        epochs_without_improvement: Epochs since it was last beaten.
        stop_reason: Why training is over. None: it is not.
        skipped_steps: Steps without an update, because the loss or the gradients were not finite.
        skipped_in_a_row: Number of the last steps that were skipped.
    """

    step: Count = 0
    tokens: Count = 0
    seconds: Amount = 0.0
    best_loss: Amount | None = None
    best_step: Count | None = None
    stopping_loss: Amount | None = None
    epochs_without_improvement: Count = 0
    stop_reason: StopReason | None = None
    skipped_steps: Count = 0
    skipped_in_a_row: Count = 0


COUNTERS = tuple(field.name for field in fields(Counters))
NEWER_COUNTERS = {"skipped_steps": 0, "skipped_in_a_row": 0}
"""Values of counters that checkpoints of the first version lack."""


@dataclass(kw_only=True)
class TrainingState(Counters):
    """The model, its optimizers, the average of its weights, torch's random generators, and the counters.

    Attributes:
        average: Of the weights. None: no averaging.
    """

    model: Transformer
    optimizers: Optimizers
    average: WeightAverage | None = None

    @classmethod
    def create(cls, config: RunConfig, device: torch.device, precision: torch.dtype = torch.float32) -> "TrainingState":
        """Return a new state of a new model in one process."""
        return cls.around(new_model(config).to(device), config.training, precision)

    @classmethod
    def around(
        cls, model: Transformer, settings: TrainingConfig, precision: torch.dtype = torch.float32
    ) -> "TrainingState":
        """Return a new state of a model that is on its device, and sharded if it is to be."""
        average = None if settings.ema_decay is None else WeightAverage(model, settings.ema_decay)
        return cls(model=model, optimizers=Optimizers(model, settings, precision), average=average)

    def update(self, factor: float) -> None:
        """Update the weights and their average by the gradients.

        Args:
            factor: Fraction of the peak learning rates.
        """
        self.optimizers.step(factor)
        if self.average is not None:
            self.average.update(self.step + 1)

    @contextmanager
    def averaged_model(self) -> Iterator[Transformer]:
        """Context with the model as it is evaluated and saved: with the average of its weights, if there is one."""
        if self.average is None:
            yield self.model
        else:
            with self.average.applied():
                yield self.model

    def record_evaluation(self, loss: float) -> bool:
        """Record a validation loss; return whether it is a new best."""
        if not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            return False
        self.best_loss, self.best_step = loss, self.step
        return True

    def record_epoch(self, loss: float, threshold: float) -> None:
        """Record the validation loss at the end of an epoch, for patience."""
        improved = self.stopping_loss is None or loss < self.stopping_loss - threshold
        if improved and math.isfinite(loss):
            self.stopping_loss, self.epochs_without_improvement = loss, 0
        else:
            self.epochs_without_improvement += 1

    def to_checkpoint(self, provenance: dict[str, Any]) -> Checkpoint:
        """Return the whole state; `provenance` is added to the metadata."""
        rng = {"cpu": torch.get_rng_state()}
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(device)
        counters = {name: getattr(self, name) for name in COUNTERS}
        model, optimizer = self.model.state_dict(), self.optimizers.state_tensors()
        if self.average is not None:
            averages = self.average.tensors()
            optimizer |= {TRAINED + name: model[name] for name in averages}
            model = model | averages
        return Checkpoint(model, optimizer, rng, provenance | counters)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a whole state.

        Raises:
            CheckpointError: The checkpoint holds weights only, or belongs to another model.
        """
        if not checkpoint.rng:
            raise CheckpointError("this checkpoint holds weights only", "resume from latest, previous or best")
        trained, optimizer = {}, {}
        for name, tensor in checkpoint.optimizer.items():
            if name.startswith(TRAINED):
                trained[name.removeprefix(TRAINED)] = tensor
            else:
                optimizer[name] = tensor
        if trained.keys() != (self.average.tensors().keys() if self.average else set()):
            raise misfit()
        try:
            load_weights(self.model, checkpoint.model)
            self.optimizers.load_state_tensors(optimizer)
            torch.set_rng_state(checkpoint.rng["cpu"])
            if self.average is not None:
                self.average.load(checkpoint.model)
                load_weights(self.model, checkpoint.model | trained)
            metadata = NEWER_COUNTERS | checkpoint.metadata
            counters = TypeAdapter(Counters).validate_python({name: metadata[name] for name in COUNTERS})
            device = next(self.model.parameters()).device
            # A run that was trained on a CPU so far continues from its seed.
            if device.type == "cuda" and "cuda" in checkpoint.rng:
                torch.cuda.set_rng_state(checkpoint.rng["cuda"], device)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            # Torch's message is a page of parameter names.
            raise misfit() from error
        for name, value in vars(counters).items():
            setattr(self, name, value)


def new_model(config: RunConfig) -> Transformer:
    """Return the model at step 0, built on the CPU so that its weights depend on the seed alone.

    What `training.freeze` names is out of training.
    """
    torch.manual_seed(config.training.seed)
    model = build_model(config)
    freeze(model, config.training.freeze)
    return model


def misfit() -> CheckpointError:
    """Return the error for a checkpoint and a config that do not belong together."""
    return CheckpointError(
        "the checkpoint does not fit the run",
        "undo the changes to its config.yaml, which describes the run as it was trained",
    )
