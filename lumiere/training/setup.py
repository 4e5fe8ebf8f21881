"""Everything resolved before training starts: config, corpus, device, precision, and what a resume may change."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lumiere.config.inheritance import INHERITED, NO_EFFECT_WHEN_TRAINED
from lumiere.config.loader import changed_config, flat_settings, validate
from lumiere.config.schema import RunConfig, TrainingConfig
from lumiere.data.corpus import load_corpus, recorded
from lumiere.data.dataset import Progress, TokenizedCorpus, tokenize_corpus
from lumiere.data.foreign_tokenizer import existing_tokenizer, fitted
from lumiere.errors import CheckpointError, ConfigError, LumiereError
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.manifest import DAMAGE_HINT
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from lumiere.training.loggers import check_packages
from lumiere.training.parent import Origin, origin_of
from lumiere.training.schedule import learning_rate_factor, num_steps

if TYPE_CHECKING:
    import torch

    from lumiere.distributed import ProcessGroup

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
"""Settings of `training` that a resume may change: the length, what is reported, and who computes a step and how."""
INEXACT = ("training.gradient_accumulation_steps", "training.compile")
"""Changeable settings that alter the rounding of a step. So do device and precision, compared as resolved."""
LOCAL = ("device", "precision", "loggers")
"""Settings of `training` that may differ between the ranks of a job: rank 0's resolved device and precision count."""
MAX_SUGGESTIONS = 8


@dataclass(frozen=True)
class TrainingSetup:
    """Everything resolved before training starts.

    Attributes:
        precision: Type of the matrix products; the weights are float32.
        peak_flops: Measured FLOP/s of the device in matrix products of that type.
        num_trained_parameters: Without those that are frozen.
        lineage: Where a fine-tuned run starts, as in `RunRecord.parent`; empty for a run that starts from scratch.
        changes: What a resume changes of the settings that the run was trained with so far.
    """

    config: RunConfig
    corpus: TokenizedCorpus
    device: "torch.device"
    precision: "torch.dtype"
    peak_flops: float
    num_parameters: int
    num_trained_parameters: int
    lineage: Mapping[str, Any] = field(default_factory=dict)
    changes: "Sequence[Change]" = ()

    @property
    def epoch_steps(self) -> int:
        """Steps per epoch: one pass over the training windows."""
        from lumiere.data.batches import steps_per_epoch

        return steps_per_epoch(self.corpus.windows("train", self.config), self.config.training.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps, unless patience ends training earlier."""
        return num_steps(self.config.training, self.epoch_steps)

    @property
    def resolved(self) -> dict[str, str]:
        """Device and precision as `run.json` records them."""
        return {"device": str(self.device), "precision": str(self.precision).removeprefix("torch.")}

    def fingerprint(self) -> dict[str, str]:
        """Return what all ranks of a job must agree on."""
        config = self.config.model_dump(exclude={"training": set(LOCAL)})
        return {
            "corpus": self.corpus.fingerprint,
            "tokenizer": self.corpus.tokenizer.fingerprint,
            "parent": json.dumps(dict(self.lineage), sort_keys=True),
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        }


def set_up(
    config: RunConfig, progress: Callable[[Progress], None] | None = None, origin: Origin | None = None
) -> TrainingSetup:
    """Tokenize the corpus, resolve device and precision, and measure the device.

    Args:
        origin: What a fine-tuned run has from its parent. None: the run starts from scratch.

    Raises:
        LumiereError: The device or the package of a logger is missing, or the corpus cannot be used.
    """
    check_packages(config.training.loggers)
    source = load_corpus(config.dataset)
    tokenizer = origin.tokenizer if origin else existing_tokenizer(config.tokenizer)
    settings = fitted(config.tokenizer, tokenizer)
    config = config.model_copy(update={"dataset": recorded(config.dataset), "tokenizer": settings})
    # Torch takes seconds to import; a missing network is reported before that.
    from lumiere.device import keep_freed_memory, peak_flops, resolve_device, resolve_precision
    from lumiere.training.freezing import trainable

    keep_freed_memory()
    device = resolve_device(config.training.device)
    precision = resolve_precision(config.training.precision, device)
    model = trainable(config)
    corpus = tokenize_corpus(config, progress, source, tokenizer=tokenizer)
    if config.training.loss_positions == "last" and not corpus.tokenizer.end_ids:
        raise ConfigError(
            "training.loss_positions=last needs a tokenizer that ends documents, and this one has no end token",
            "name one as eos_token in the tokenizer_config.json beside it",
        )
    return TrainingSetup(
        config,
        corpus,
        device,
        precision,
        peak_flops(device, precision),
        model.num_parameters,
        model.num_trained_parameters,
        origin.lineage if origin else {},
    )


def set_up_resume(
    run: Run, progress: Callable[[Progress], None] | None = None, settings: Mapping[str, Any] = MappingProxyType({})
) -> TrainingSetup:
    """Set up a run that exists with its own config, on the device and in the precision recorded for it.

    Args:
        settings: Settings by dotted path, of those that a resume may change. A device or precision among them replaces
            the recorded one. A recorded device that is missing becomes `auto`.

    Raises:
        ConfigError: A setting may not be changed, or config.yaml is not what the run was trained with.
        LumiereError: The run was imported, the device is missing, or the corpus or the tokenizer differs.
    """
    if run.status == "imported":
        raise LumiereError(
            f"run {run.id} was imported: there is no training to resume",
            f"train a new run from its weights: lumiere train CONFIG --from {run.id}",
        )
    config = with_settings(run.load_config(), settings)
    changed = changed_settings(run, config)
    check_changes(changed, run.id)
    record = run.record
    setup = set_up(with_recorded_device(config, record, settings), progress, origin_of(run))
    # A run that was killed while it was created may lack a tokenizer, and was not trained yet.
    exists = run.tokenizer_path.exists() or CheckpointManager(run.path.parent).names(run)
    if exists and setup.corpus.tokenizer.fingerprint != run.load_tokenizer().fingerprint:
        raise LumiereError(
            f"the tokenizer of '{config.dataset.name}' is not the one that run {run.id} was trained with",
            "restore the corpus and the version of tokenizers that run.json names, or start a new run from these "
            f"weights with --from {run.id}",
        )
    # Such a run has no record to compare with either.
    if setup.corpus.fingerprint != (record.corpus_sha256 or setup.corpus.fingerprint):
        raise LumiereError(
            f"the corpus '{config.dataset.name}' is not the one that run {run.id} was trained on",
            f"restore it as it was, or start a new run from these weights with --from {run.id}",
        )
    return replace(setup, config=config, changes=changed)


def set_up_rank(config: RunConfig, chosen: Mapping[str, str], origin: Origin | None = None) -> TrainingSetup:
    """Set up a rank other than 0: quietly, without loggers, with the device and precision that rank 0 chose."""
    taken = {"loggers": [], "device": chosen["device"].partition(":")[0], "precision": chosen["precision"]}
    settings = config.training.model_copy(update=taken)
    return set_up(config.model_copy(update={"training": settings}), origin=origin)


def check_shares(settings: TrainingConfig, device: "torch.device", processes: "ProcessGroup") -> None:
    """Check that the processes can share each batch, and the devices of a machine.

    Raises:
        ConfigError: The batch size is no multiple of processes times accumulation steps.
        LumiereError: The processes cannot share this kind of device.
    """
    from lumiere.training.parallel import local_device

    local_device(device, processes)
    size, parts = settings.batch_size, settings.gradient_accumulation_steps
    unit = processes.size * parts
    if size % unit == 0:
        return
    each = f" with {parts} accumulation steps each" if parts > 1 else ""
    fitting = [number for number in range(1, size // parts + 1) if size % (number * parts) == 0][-MAX_SUGGESTIONS:]
    sizes = sorted({max(1, size // unit) * unit, -(-size // unit) * unit})
    raise ConfigError(
        f"training.batch_size {size} cannot be shared evenly by {processes.size} processes{each}",
        f"numbers of processes that fit: {', '.join(map(str, fitting))}; batch sizes that fit: "
        f"{', '.join(map(str, sizes))}",
    )


# What a resume may change


@dataclass(frozen=True)
class Change:
    """A setting that differs from what the run was trained with so far."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {text(self.before)} -> {text(self.after)}"


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Replace settings of the config by dotted path, from left to right.

    Raises:
        ConfigError: As `load_config`.
    """
    return changed_config(config.model_dump(), settings.items()) if settings else config


def with_recorded_device(config: RunConfig, record: RunRecord, given: Collection[str]) -> RunConfig:
    """Return `config` with the device and the precision to resume a run with.

    A recorded device is kept if it exists, and the recorded precision if the device is of the same kind.

    Args:
        record: Contents of `run.json`.
        given: Keys that the user set, whose values in `config` are kept.
    """
    from lumiere.device import resolve_device

    recorded = {"training.device": record.device, "training.precision": record.precision}
    taken = {path: value for path, value in recorded.items() if value is not None and path not in given}
    resumed = changed_config(config.model_dump(), taken.items())
    try:
        device = resolve_device(resumed.training.device)
    except LumiereError:
        if "training.device" not in taken:
            raise
        taken["training.device"] = "auto"
        device = resolve_device("auto")
    if record.device and device.type != record.device.partition(":")[0]:
        taken.pop("training.precision", None)
    return changed_config(config.model_dump(), taken.items())


def changed_settings(run: Run, config: RunConfig) -> list[Change]:
    """Return what differs in `config` from what the run was trained with, by its newest checkpoint."""
    manager = CheckpointManager(run.path.parent)
    for name in ("latest", "previous", "best"):
        if name in manager.names(run):
            with contextlib.suppress(CheckpointError):
                saved = manager.load(run, name, groups=()).metadata.get("config")
                return changes(trained_config(saved, name), config)
    return changes(run.load_config(), config)


def trained_config(saved: Any, name: str) -> RunConfig:
    """Return the config in the metadata of the checkpoint `name`.

    Raises:
        CheckpointError: It is not a config.
    """
    try:
        return validate(saved)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {name} holds no config: {error.message}", DAMAGE_HINT) from None


def changes(before: RunConfig, after: RunConfig) -> list[Change]:
    """Return the settings that differ."""
    old, new = flat_settings(before), flat_settings(after)
    return [Change(path, old[path], value) for path, value in new.items() if value != old[path]]


def check_changes(changed: Sequence[Change], run_id: str) -> None:
    """Check that a resume changes nothing that the steps so far depend on.

    Raises:
        ConfigError: Naming the first such setting.
    """
    for change in changed:
        section, _, name = change.path.partition(".")
        if section != "training" or name not in CHANGEABLE:
            # A run that starts from these weights has their model and tokenizer too.
            keeps = section in INHERITED and name not in NO_EFFECT_WHEN_TRAINED
            start = "with it" if keeps else f"from these weights with --from {run_id}"
            raise ConfigError(
                f"run {run_id} was trained with {change.path} {text(change.before)}, which a resume cannot change to "
                f"{text(change.after)}",
                f"start a new run {start}; a resume may change: {', '.join(CHANGEABLE)}",
            )


def check_schedule(before: TrainingConfig, after: TrainingConfig, epoch_steps: int, step: int) -> None:
    """Check that the steps so far had the learning rates that a schedule of the new length gives them.

    Once the rate decays it never rises again, and the warm-up does not depend on the length, so the newest step decides
    for all of them.

    Args:
        step: The steps trained so far.

    Raises:
        ConfigError: Some of them had other learning rates.
    """
    if step == 0 or before.schedule == "constant":
        return
    old, new = num_steps(before, epoch_steps), num_steps(after, epoch_steps)
    if step > new or learning_rate_factor(step, old, before) != learning_rate_factor(step, new, before):
        raise ConfigError(
            f"the {before.schedule} schedule of {old:,} steps cannot become one of {new:,} at step {step:,}: "
            f"the learning rate has decayed already, and the steps so far would have had other rates",
            "start a new run of that length, or one from these weights with --from RUN; to extend a run, train with "
            "training.schedule=constant, or with training.decay_fraction below 1 and extend it before the decay",
        )


def text(value: Any) -> str:
    """Format a value as a config shows it."""
    return "empty" if value is None else str(value)
