"""What a model card says of a run, gathered from the run's folder, which may be old or damaged."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lumiere.config.schema import DatasetConfig, RunConfig
from lumiere.evaluation import Evaluation
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run

LARGEST = 1e300
"""Beyond it a whole number is none that a format for floats takes."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class CardFacts:
    """Everything that is in a card.

    Attributes:
        record: what `run.json` says, of which nothing can be relied on.
        checkpoint: name of the checkpoint that the card is about: `best`, or `latest` where there is none.
        step: updates that it has seen.
        evaluation: of that checkpoint on the validation split.
        num_tokens_used: ids that the tokenizer gives out.
        on_hub: whether the corpus is a dataset of the Hugging Face Hub, and not a folder of that name.
    """

    run_name: str
    status: str
    config: RunConfig
    record: Mapping[str, Any]
    checkpoint: str
    step: int
    evaluation: Evaluation
    num_tokens_used: int
    on_hub: bool

    @property
    def run_id(self) -> str:
        return self.run_name.split("_")[1]


def card_checkpoint(run: Run) -> tuple[str, int]:
    """The checkpoint that a card is about, and its step.

    Raises:
        CheckpointError: the run has none, or it is damaged.
    """
    manager = CheckpointManager(run.path.parent)
    name = manager.resolve(run, "best")
    return name, manager.load(run, name, groups=()).step


def kept_evaluation(record: Mapping[str, Any], step: int) -> Evaluation | None:
    """The evaluation of the checkpoint of `step` that the training left in the record.

    Returns:
        None where there is none: the run is older than that, was killed between two writes, or is damaged.
    """
    kept = record.get("best_evaluation")
    if not isinstance(kept, dict) or kept.get("step") != step:
        return None
    values: dict[str, Any] = {}
    for field in fields(Evaluation):
        value = kept.get(field.name)
        if value is None and field.name.endswith("perplexity"):
            value = math.inf  # which JSON does not have
        wanted = int if field.type is int else int | float
        if isinstance(value, bool) or not isinstance(value, wanted) or not (value <= LARGEST or value == math.inf):
            return None
        values[field.name] = value
    return Evaluation(**values) if math.isfinite(values["loss"]) else None


def gather(run: Run, checkpoint: str, step: int, evaluation: Evaluation) -> CardFacts:
    """The facts of a run.

    Raises:
        LumiereError: its config or its tokenizer cannot be read.
    """
    config = run.load_config()
    return CardFacts(
        run_name=run.name,
        status=run.status,
        config=config,
        record=run.record,
        checkpoint=checkpoint,
        step=step,
        evaluation=evaluation,
        num_tokens_used=len(run.load_tokenizer()),
        on_hub=is_on_hub(config.dataset),
    )


def is_on_hub(dataset: DatasetConfig) -> bool:
    """Whether the name is a Hub name, and no folder that is there."""
    return HUB_NAME.fullmatch(dataset.name) is not None and not os.path.exists(dataset.name)


def known_language(dataset: DatasetConfig) -> str | None:
    """`en` for the corpora that are known to be English; None for all others."""
    is_wikitext = dataset.name in ("wikitext", "Salesforce/wikitext") or (dataset.subset or "").startswith("wikitext-")
    return "en" if dataset.name == "stories" or is_wikitext else None
