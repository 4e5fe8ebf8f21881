"""`run.json`: the record that a training run keeps of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lumiere.persistence.metrics import as_number

Number = int | float
MAX_ANCESTORS = 20


@dataclass(frozen=True)
class RunRecord:
    """The contents of `run.json`. What is missing, or has another type, keeps its default.

    Attributes:
        status: As last written: `running`, `finished`, `interrupted`, `failed`, `imported`; `unknown` by default.
            `Run.status` also knows `crashed`.
        source: Where an imported model is from: its path or Hub name and commit, format, and hashes of its files.
        epoch, tokens, training_seconds: Progress at the last save; seconds exclude evaluation and saving.
        best_evaluation: The evaluation that made `best`, with its step, for the model card.
        splits: Counts of documents, tokens and bytes by split.
        num_trained_parameters: Without those that `training.freeze` freezes.
        parent: Where a fine-tuned run started: `run`, `checkpoint`, `step` and `weights_sha256`, with the `dataset` and
            the `parent` of that run. The tokenizer is that run's, too.
        job: The torchrun launch that trained the run last; its `token` identifies it.
        resumes: One entry for each resume: when, at which step, what changed.
        values: All keys, as they are in the file.
    """

    status: str = "unknown"
    error: str | None = None
    stop_reason: str | None = None
    created_at: str | None = None
    command: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    corpus_sha256: str | None = None
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_parameters: Number | None = None
    num_trained_parameters: Number | None = None
    parent: Mapping[str, Any] = field(default_factory=dict)
    step: Number | None = None
    total_steps: Number | None = None
    epoch: Number | None = None
    tokens: Number | None = None
    training_seconds: Number | None = None
    best_loss: Number | None = None
    best_step: Number | None = None
    skipped_steps: Number | None = None
    best_evaluation: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    precision: str | None = None
    peak_flops: Number | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    host: str | None = None
    boot_id: str | None = None
    pid: Number | None = None
    world_size: Number | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    resumes: tuple[Any, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, values: Any) -> RunRecord:
        """Return the record in the value of a JSON text, which may be anything."""
        values = values if isinstance(values, dict) else {}
        known = {each.name: READERS[str(each.type)](values.get(each.name)) for each in fields(cls)[:-1]}
        return cls(**{name: value for name, value in known.items() if value is not None}, values=values)

    @property
    def ancestors(self) -> list[Mapping[str, Any]]:
        """The runs that this one comes from: its parent, the parent of that, and so on."""
        found, parent = [], self.parent
        while parent and len(found) < MAX_ANCESTORS:
            found.append(parent)
            parent = _mapping(parent.get("parent")) or {}
        return found

    def to_json(self) -> dict[str, Any]:
        """Return all keys as they are in the file, and a status in any case."""
        return {"status": self.status} | dict(self.values)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, dict) else None


def _mappings(value: Any) -> Mapping[str, Mapping[str, Any]] | None:
    return {name: item for name, item in (_mapping(value) or {}).items() if isinstance(item, dict)}


def _list(value: Any) -> tuple[Any, ...] | None:
    return tuple(value) if isinstance(value, list) else None


READERS: dict[str, Callable[[Any], Any]] = {
    "str": _text,
    "str | None": _text,
    "Number | None": as_number,
    "tuple[str, ...]": lambda value: tuple(map(str, _list(value) or ())),
    "tuple[Any, ...]": _list,
    "Mapping[str, Any]": _mapping,
    "Mapping[str, Mapping[str, Any]]": _mappings,
}
