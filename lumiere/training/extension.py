"""Which settings of a run may change when it goes on, and why the others may not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lumiere.config.loader import assign, flat_settings, parse_override, validate
from lumiere.config.schema import RunConfig, TrainingConfig
from lumiere.errors import ConfigError
from lumiere.training.costs import num_steps
from lumiere.training.schedule import learning_rate_factor

if TYPE_CHECKING:
    from lumiere.training.preparation import Preparation

CHANGEABLE = (
    "max_epochs",
    "max_steps",
    "patience",
    "stopping_threshold",
    "on_nonfinite",
    "eval_interval",
    "log_interval",
    "checkpoint_interval",
    "snapshots",
    "loggers",
    "parallel",
    "gather_limit_gb",
    "rank_timeout",
    "device",
    "precision",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "compile",
)
"""Settings of `training` that say how long it goes on, what is watched, and who computes a step and how."""

INEXACT = ("training.gradient_accumulation_steps", "training.compile")
"""Changeable settings on which the rounding of a step depends; of device and precision, what was taken counts."""


@dataclass(frozen=True)
class Change:
    """A setting that is no longer what the run was trained with so far."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {text(self.before)} -> {text(self.after)}"


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config with `section.key=value` texts, as `--set` takes them, applied from left to right.

    Raises:
        ConfigError: as `load_config`.
    """
    values = config.model_dump()
    for override in overrides:
        assign(values, *parse_override(override))
    return validate(values)


def changes(before: RunConfig, after: RunConfig) -> list[Change]:
    """The settings that differ."""
    old, new = flat_settings(before), flat_settings(after)
    return [Change(path, old[path], value) for path, value in new.items() if value != old[path]]


def inexact_changes(before: RunConfig, preparation: "Preparation", record: Mapping[str, Any]) -> list[Change]:
    """Return the changes after which the weights are no longer bit-identical to those of an uninterrupted run.

    Args:
        before: the config of the checkpoint to resume from.
        record: contents of `run.json`, with the device and the precision so far.
    """
    taken = {"device": str(preparation.device), "precision": str(preparation.precision).removeprefix("torch.")}
    moved = [Change(key, record[key], value) for key, value in taken.items() if record.get(key, value) != value]
    return moved + [change for change in changes(before, preparation.config) if change.path in INEXACT]


def check_changes(changed: Sequence[Change], run_id: str) -> None:
    """Refuse what would make another training of what was trained so far.

    Raises:
        ConfigError: naming the first such setting.
    """
    for change in changed:
        section, _, name = change.path.partition(".")
        if section != "training" or name not in CHANGEABLE:
            raise ConfigError(
                f"run {run_id} was trained with {change.path} {text(change.before)}, which cannot become "
                f"{text(change.after)} on the way: the steps so far would have been others",
                f"start a new run with it; on the way may change: {', '.join(CHANGEABLE)}",
            )


def check_schedule(before: TrainingConfig, after: TrainingConfig, epoch_steps: int, step: int) -> None:
    """Refuse another length of a schedule that has begun to fall.

    A run that goes on to a longer end must have come through the rates of that longer schedule. As rates never rise
    again once they fall, and the warm-up does not depend on the length, the newest step tells for all of them.

    Args:
        epoch_steps: steps of an epoch.
        step: the steps trained so far.

    Raises:
        ConfigError: if some of these steps had other learning rates than the new schedule gives them.
    """
    if step == 0 or before.schedule == "constant":
        return
    plan = (before.warmup_steps, before.schedule, before.decay_fraction)
    old, new = num_steps(before, epoch_steps), num_steps(after, epoch_steps)
    if step > new or learning_rate_factor(step, old, *plan) != learning_rate_factor(step, new, *plan):
        raise ConfigError(
            f"the {before.schedule} schedule of {old:,} steps cannot become one of {new:,} at step {step:,}: "
            f"the learning rate already fell, and the steps so far would have had other rates",
            "start a new run of that length; a run that is to be extended needs training.schedule=constant, or "
            "training.decay_fraction below 1 and an extension before the fall",
        )


def text(value: Any) -> str:
    """A value as a config shows it."""
    return "empty" if value is None else str(value)
