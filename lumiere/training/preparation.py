"""What a training needs before it can start: everything that can fail on the user's input is found out here."""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lumiere.config.loader import parse_override, validate
from lumiere.config.schema import RunConfig
from lumiere.data.corpus import load_corpus, recorded
from lumiere.data.dataset import Progress, TokenizedCorpus, tokenize_corpus
from lumiere.errors import CheckpointError, ConfigError, LumiereError
from lumiere.persistence.checkpoint import DAMAGE_HINT
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run
from lumiere.training.extension import Change, changes, check_changes, with_overrides
from lumiere.training.loggers.opening import check_packages

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Preparation:
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


def prepare(config: RunConfig, progress: Callable[[Progress], None] | None = None) -> Preparation:
    """Find the device, read and tokenize the corpus, and measure the model and the device.

    Raises:
        LumiereError: if the device or a logger's package is not there, or the corpus cannot be used.
    """
    check_packages(config.training.loggers)
    source = load_corpus(config.dataset)
    config = config.model_copy(update={"dataset": recorded(config.dataset)})
    # Torch takes seconds to load: whoever has no network is told before that, and not after.
    from lumiere.components.device import peak_flops, resolve_device, resolve_precision
    from lumiere.models.transformer import empty_model
    from lumiere.training.memory import keep_freed_memory

    keep_freed_memory()
    device = resolve_device(config.training.device)
    precision = resolve_precision(config.training.precision, device)
    corpus = tokenize_corpus(config, progress, source)
    num_parameters = empty_model(config).num_parameters
    return Preparation(config, corpus, device, precision, peak_flops(device, precision), num_parameters)


def prepare_resume(
    run: Run, progress: Callable[[Progress], None] | None = None, overrides: Sequence[str] = ()
) -> Preparation:
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
    preparation = prepare(with_recorded_device(config, record, given), progress)
    # A run that was killed while it was made may have no tokenizer yet, and then nothing was trained with another one.
    made = run.tokenizer_path.exists() or CheckpointManager(run.path.parent).names(run)
    if made and preparation.corpus.tokenizer.fingerprint != run.load_tokenizer().fingerprint:
        raise LumiereError(
            f"the tokenizer of '{config.dataset.name}' is not the one that run {run.id} was trained with",
            "restore the corpus and the version of tokenizers that run.json names, or start a new run",
        )
    # A run that was killed while it was made has no record to compare with, and no checkpoint either.
    if preparation.corpus.fingerprint != record.get("corpus_sha256", preparation.corpus.fingerprint):
        raise LumiereError(
            f"the corpus '{config.dataset.name}' is not the one that run {run.id} was trained on",
            "restore it as it was, or start a new run",
        )
    return replace(preparation, config=config)


def with_recorded_device(config: RunConfig, record: Mapping[str, Any], given: Collection[str]) -> RunConfig:
    """Return `config` with the device and the precision to resume a run with.

    A recorded device is kept if it is there, and the recorded precision if the device is of the same kind.

    Args:
        record: contents of `run.json`.
        given: keys that the user set, whose values in `config` are kept.
    """
    from lumiere.components.device import resolve_device

    def having(**taken: Any) -> RunConfig:
        # Read as strictly as a config: the record is a file too.
        values = config.model_dump()
        return validate(values | {"training": values["training"] | taken})

    taken = {key: record[key] for key in ("device", "precision") if key in record}
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
