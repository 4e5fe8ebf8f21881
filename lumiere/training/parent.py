"""The parent of a fine-tuned run: the checkpoint of another run, whose weights, model and tokenizer it starts from.

A fine-tuned run keeps what it needs of its parent: the tokenizer in its own `tokenizer.json`, the weights as its
snapshot of step 0, and the lineage in `run.json`. Importing this module loads no torch.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lumiere.config.inheritance import inherit
from lumiere.config.schema import RunConfig
from lumiere.errors import CheckpointError
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.loading import OpenedModel, check_tokenizer, open_model
from lumiere.persistence.runs import Run, RunStore, split_reference

if TYPE_CHECKING:
    from lumiere.data.tokenizer import Tokenizer

DEFAULT_CHECKPOINT = "best"


@dataclass(frozen=True)
class Origin:
    """What a fine-tuned run has from its parent besides weights, and a resumed run from its folder.

    Attributes:
        lineage: As `RunRecord.parent`; empty for an existing tokenizer without a parent.
    """

    tokenizer: "Tokenizer"
    lineage: Mapping[str, Any]


@dataclass(frozen=True)
class Parent:
    """A checkpoint of a run to start from.

    Attributes:
        checkpoint: Its name; of a `best` that does not exist, `latest` is taken.
    """

    run: Run
    checkpoint: str

    @classmethod
    def find(cls, reference: str, store: RunStore) -> "Parent":
        """Return the parent that `RUN` or `RUN@CHECKPOINT` names.

        Raises:
            LumiereError: There is no such run, or a part of the reference is empty.
        """
        name, checkpoint = split_reference(reference, DEFAULT_CHECKPOINT)
        return cls(store.open(name), checkpoint)

    def inherit(self, given: Mapping[str, Any]) -> RunConfig:
        """Return the config of a run that starts here, from what the user set; see `lumiere.config.inheritance`."""
        return inherit(given, self.run.load_config(), self.run.id)

    def open(self, notify: Callable[[str], None] = lambda note: None) -> OpenedModel:
        """Load the checkpoint, on the CPU; see `open_model`."""
        return open_model(self.run.name, self.checkpoint, "cpu", str(self.run.path.parent), notify)

    def origin(self, notify: Callable[[str], None] = lambda note: None) -> Origin:
        """Return tokenizer and lineage of a run that starts here, after loading the weights to check them."""
        opened = self.open(notify)
        return Origin(opened.tokenizer, lineage(opened))


def lineage(opened: OpenedModel) -> dict[str, Any]:
    """Return what `run.json` of a run records that starts from this checkpoint."""
    record = opened.run.record
    return {
        "run": opened.run.name,
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "weights_sha256": opened.weights_sha256,
        "dataset": record.dataset,
        "parent": record.parent or None,
    }


def origin_of(run: Run) -> Origin | None:
    """Return what a run that exists has from its parent, or its existing tokenizer; None if it has neither.

    Raises:
        LumiereError: Its tokenizer is missing, damaged, or not the one that it was trained with.
    """
    name, checkpoint = readable_checkpoint(run)
    # A run that lost its record still knows.
    saved = checkpoint.metadata.get("parent") if checkpoint else None
    found = run.record.parent or (saved if isinstance(saved, dict) else {})
    if not found and not (run.load_config().tokenizer.path and run.tokenizer_path.exists()):
        return None
    tokenizer = run.load_tokenizer()
    if checkpoint is not None:
        check_tokenizer(run, tokenizer, checkpoint, name)
    return Origin(tokenizer, found)


def readable_checkpoint(run: Run) -> tuple[str, Checkpoint | None]:
    """Return the name and the metadata, without tensors, of some checkpoint of a run."""
    manager = CheckpointManager(run.path.parent)
    for name in manager.names(run):
        with suppress(CheckpointError):
            return name, manager.load(run, name, groups=())
    return "", None
