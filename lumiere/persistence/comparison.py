"""Runs side by side: where their configs differ, and what they reached, at the end and at equal tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lumiere.errors import LumiereError
from lumiere.persistence.history import Point, last_records, point_of, points_at
from lumiere.persistence.listing import Entry, read_entry
from lumiere.persistence.metrics import as_number
from lumiere.persistence.runs import Run


@dataclass(frozen=True)
class Reached:
    """How far one run came.

    Attributes:
        training, evaluation: the last line of each kind in its metrics; empty where there is none.
        training_at, validation_at: its last losses at or before the comparison's `common_tokens`.
    """

    entry: Entry
    training: dict[str, Any]
    evaluation: dict[str, Any]
    training_at: Point | None
    validation_at: Point | None

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole training, evaluating and saving left out; by its last line of metrics."""
        tokens, seconds = as_number(self.training.get("tokens")), as_number(self.training.get("time"))
        return tokens / seconds if tokens is not None and seconds else None


@dataclass(frozen=True)
class Comparison:
    """Several runs.

    Attributes:
        differences: by dotted key, the value in each run; only keys whose values are not all equal.
        common_tokens: as many tokens as every run has an evaluation at or before: the fewest among their last
            evaluations. None where a run was never evaluated. Losses there are measured ones, never interpolated:
            where runs are evaluated at other steps, the tokens that stand beside each loss tell how far they are apart.
        same_corpus: whether the losses are over the same tokens; None where a run does not say.
    """

    runs: tuple[Reached, ...]
    differences: dict[str, tuple[Any, ...]]
    common_tokens: int | None
    same_corpus: bool | None


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs.

    Raises:
        LumiereError: there are fewer than two, or a run's config cannot be read.
    """
    if len(set(runs)) < 2:
        raise LumiereError("a comparison needs two runs or more", "for example lumiere runs compare a6jz dkxc")
    configs = [config_values(run) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: tuple(config.get(key) for config in configs) for key in keys}
    differences = {key: row for key, row in rows.items() if not all(_equal(row[0], value) for value in row)}
    lasts = [last_records(run.metrics_path) for run in runs]
    ends = [point_of(evaluation, "val_loss") for _, evaluation in lasts]
    common = min((end.tokens for end in ends if end), default=None) if all(ends) else None
    reached = []
    for run, (training, evaluation) in zip(runs, lasts, strict=True):
        at = (None, None) if common is None else points_at(run.metrics_path, common)
        reached.append(Reached(read_entry(run), training, evaluation, *at))
    corpora = [item.entry.record.get("corpus_sha256") for item in reached]
    same = None if None in corpora else all(corpus == corpora[0] for corpus in corpora)
    return Comparison(tuple(reached), differences, common, same)


def config_values(run: Run) -> dict[str, Any]:
    """A run's config by dotted keys, in the order of the schema, as JSON values.

    What this version refuses stands there as text, so that runs of other versions can be looked at; a key that such a
    run does not have stands there with its default.

    Raises:
        ConfigError: there is no config, or it is no YAML.
    """
    from lumiere.config.loader import read_config, read_value

    found = flatten(read_config(run.config_path))
    return default_values() | {key: _plain(read_value(key, value)) for key, value in found.items()}


def default_values() -> dict[str, Any]:
    """The default of every setting, by dotted key."""
    from lumiere.config.schema import RunConfig

    return flatten(RunConfig().model_dump())


def changed_values(run: Run) -> dict[str, tuple[Any, Any]]:
    """The settings of a run that are not the default: value and default by dotted key.

    Raises:
        ConfigError: as `config_values`.
    """
    defaults = default_values()
    pairs = {key: (value, defaults.get(key)) for key, value in config_values(run).items()}
    return {key: pair for key, pair in pairs.items() if not _equal(*pair)}


def flatten(config: dict[Any, Any]) -> dict[str, Any]:
    """`{"model": {"dropout": 0.1}}` as `{"model.dropout": 0.1}`; what is deeper is one value."""
    flat = {}
    for section, values in config.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": _plain(value) for key, value in values.items()}
        else:
            flat[str(section)] = _plain(values)
    return flat


def _plain(value: Any) -> Any:
    """`value` as JSON has it: YAML also knows dates and sets."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case _:
            return str(value)


def _equal(a: Any, b: Any) -> bool:
    # Python takes True for 1.
    return a == b and isinstance(a, bool) == isinstance(b, bool)
