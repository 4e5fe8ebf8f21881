"""Everything resolved before training starts: config, corpus, device, precision, and what a resume may change."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lumiere.config.loader import assign, flat_settings, parse_override, validate
from lumiere.config.schema import RunConfig, TrainingConfig
from lumiere.data.corpus import load_corpus, recorded
from lumiere.data.dataset import Progress, TokenizedCorpus, tokenize_corpus
from lumiere.errors import CheckpointError, ConfigError, LumiereError
from lumiere.persistence.checkpoint import DAMAGE_HINT
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from lumiere.training.loggers import check_packages
from lumiere.training.schedule import learning_rate_factor, num_steps

if TYPE_CHECKING:
    import torch


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


def inexact_changes(before: RunConfig, setup: "TrainingSetup", record: RunRecord) -> list[Change]:
    """Return the changes after which the weights are no longer bit-identical to those of an uninterrupted run.

    Args:
        before: the config of the checkpoint to resume from.
        record: contents of `run.json`, with the device and the precision so far.
    """
    taken = {"device": str(setup.device), "precision": str(setup.precision).removeprefix("torch.")}
    recorded = {"device": record.device, "precision": record.precision}
    moved = [Change(key, recorded[key], value) for key, value in taken.items() if recorded[key] not in (None, value)]
    return moved + [change for change in changes(before, setup.config) if change.path in INEXACT]


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


@dataclass(frozen=True)
class TrainingSetup:
    """All that a training needs and that could not be had for granted.

    Attributes:
        precision: type of the matrix products.
        peak_flops: FLOP/s that the device reaches in them, measured just now.
    """

    config: RunConfig
    corpus: TokenizedCorpus
    device: "torch.device"
    precision: "torch.dtype"
    peak_flops: float
    num_parameters: int

    @property
    def epoch_steps(self) -> int:
        """Steps in which every training window is seen once."""
        from lumiere.data.batches import steps_per_epoch

        return steps_per_epoch(self.corpus.windows("train", self.config), self.config.training.batch_size)


def set_up(config: RunConfig, progress: Callable[[Progress], None] | None = None) -> TrainingSetup:
    """Find the device, read and tokenize the corpus, and measure the model and the device.

    Raises:
        LumiereError: if the device or a logger's package is not there, or the corpus cannot be used.
    """
    check_packages(config.training.loggers)
    source = load_corpus(config.dataset)
    config = config.model_copy(update={"dataset": recorded(config.dataset)})
    # Torch takes seconds to load: whoever has no network is told before that, and not after.
    from lumiere.device import keep_freed_memory, peak_flops, resolve_device, resolve_precision
    from lumiere.models.transformer import empty_model

    keep_freed_memory()
    device = resolve_device(config.training.device)
    precision = resolve_precision(config.training.precision, device)
    corpus = tokenize_corpus(config, progress, source)
    num_parameters = empty_model(config).num_parameters
    return TrainingSetup(config, corpus, device, precision, peak_flops(device, precision), num_parameters)


def set_up_resume(
    run: Run, progress: Callable[[Progress], None] | None = None, overrides: Sequence[str] = ()
) -> TrainingSetup:
    """`prepare` for a run that exists: with its own config, on the device and in the precision that it took.

    Args:
        overrides: `section.key=value` texts for settings that may change on the way. A device or a precision among
            them replaces the recorded one, and so does `auto` a recorded device that is not there.

    Raises:
        ConfigError: if one of them may not, or config.yaml is no longer what the run was trained with.
        LumiereError: if the device that is asked for is not there, or the corpus or the tokenizer is another one.
    """
    config = with_overrides(run.load_config(), overrides)
    check_changes(changed_settings(run, config), run.id)
    record = run.record
    given = {parse_override(override)[0] for override in overrides}
    setup = set_up(with_recorded_device(config, record, given), progress)
    # A run that was killed while it was made may have no tokenizer yet, and then nothing was trained with another one.
    made = run.tokenizer_path.exists() or CheckpointManager(run.path.parent).names(run)
    if made and setup.corpus.tokenizer.fingerprint != run.load_tokenizer().fingerprint:
        raise LumiereError(
            f"the tokenizer of '{config.dataset.name}' is not the one that run {run.id} was trained with",
            "restore the corpus and the version of tokenizers that run.json names, or start a new run",
        )
    # A run that was killed while it was made has no record to compare with, and no checkpoint either.
    if setup.corpus.fingerprint != (record.corpus_sha256 or setup.corpus.fingerprint):
        raise LumiereError(
            f"the corpus '{config.dataset.name}' is not the one that run {run.id} was trained on",
            "restore it as it was, or start a new run",
        )
    return replace(setup, config=config)


def with_recorded_device(config: RunConfig, record: RunRecord, given: Collection[str]) -> RunConfig:
    """Return `config` with the device and the precision to resume a run with.

    A recorded device is kept if it is there, and the recorded precision if the device is of the same kind.

    Args:
        record: contents of `run.json`.
        given: keys that the user set, whose values in `config` are kept.
    """
    from lumiere.device import resolve_device

    def having(**taken: Any) -> RunConfig:
        # Read as strictly as a config: the record is a file too.
        values = config.model_dump()
        return validate(values | {"training": values["training"] | taken})

    recorded = {"device": record.device, "precision": record.precision}
    taken = {key: value for key, value in recorded.items() if value is not None}
    wanted = having(**{key: value for key, value in taken.items() if f"training.{key}" not in given})
    if "device" not in taken:
        return wanted
    try:
        device = resolve_device(wanted.training.device)
    except LumiereError:
        if "training.device" in given:
            raise
        wanted = having(**wanted.training.model_dump(include={"precision"}), device="auto")
        device = resolve_device("auto")
    if device.type == taken["device"].partition(":")[0] or "training.precision" in given:
        return wanted
    return having(device=wanted.training.device)


def changed_settings(run: Run, config: RunConfig) -> list[Change]:
    """What differs in `config` from what the run was trained with, by its newest checkpoint."""
    manager = CheckpointManager(run.path.parent)
    for name in ("latest", "previous", "best"):
        if name in manager.names(run):
            with contextlib.suppress(CheckpointError):
                saved = manager.load(run, name, groups=()).metadata.get("config")
                return changes(trained_config(saved, name), config)
    return changes(run.load_config(), config)


def trained_config(saved: Any, name: str) -> RunConfig:
    """The config in the metadata of the checkpoint `name`.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return validate(saved)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {name} holds no config: {error.message}", DAMAGE_HINT) from None
