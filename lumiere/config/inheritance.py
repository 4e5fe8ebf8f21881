"""The config of a fine-tuned run: model and tokenizer are its parent's, everything else is its own."""

import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lumiere.config.loader import validate
from lumiere.config.schema import RunConfig, Section
from lumiere.errors import ConfigError, quoted

QUOTE = "'"
INHERITED = ("model", "tokenizer")
"""Sections that describe the weights and the ids they know."""
NO_EFFECT_WHEN_TRAINED = {"dropout", "zero_output_init"}
"""Model settings that do not change what trained weights compute."""


def inherit(given: Mapping[str, Any], parent: RunConfig, run_id: str) -> RunConfig:
    """Return the config of a run that starts from the weights of another.

    Args:
        given: What the user set, from `given_settings`. Model and tokenizer settings in it must have the parent's
            values, except `NO_EFFECT_WHEN_TRAINED`.
        parent: Config of the other run.
        run_id: Its id, for errors.

    Raises:
        ConfigError: A setting differs from the parent's, or as `validate`.
    """
    merged, conflicts = dict(given), []
    for section in INHERITED:
        own, theirs = given.get(section, {}), getattr(parent, section)
        if not isinstance(own, Mapping):
            continue  # which `validate` refuses
        for key, value in own.items():
            is_fixed = key in type(theirs).model_fields and key not in NO_EFFECT_WHEN_TRAINED
            if is_fixed and read(theirs, key, value) != getattr(theirs, key):
                conflicts.append((f"{section}.{key}", getattr(theirs, key), value))
        merged[section] = theirs.model_dump() | dict(own)
    if conflicts:
        raise conflict(conflicts, run_id)
    return validate(merged)


def read(section: Section, key: str, value: Any) -> Any:
    """Parse a value as the schema does, beside the other settings of a section; return it unchanged if it is wrong."""
    try:
        return getattr(type(section).model_validate(section.model_dump() | {key: value}), key)
    except ValidationError:
        return value


def conflict(conflicts: list[tuple[str, Any, Any]], run_id: str) -> ConfigError:
    """Return the error of settings given as path, the parent's value, and another one."""
    differences = ", ".join(f"{path} is {plain(theirs)}, not {plain(ours)}" for path, theirs, ours in conflicts)
    keep = " ".join(f"--set {shlex.quote(f'{path}={plain(theirs)}')}" for path, theirs, _ in conflicts)
    return ConfigError(
        f"the model and tokenizer of run {run_id} cannot change: {differences}",
        f"leave such settings out of the config, or set the run's values: {keep}",
    )


def plain(value: Any) -> str:
    """Format a value as `--set` takes it."""
    if isinstance(value, Section):
        value = value.model_dump()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key).strip(QUOTE)}: {plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(plain, value))}]"
    return "null" if value is None else quoted(value).strip(QUOTE)
