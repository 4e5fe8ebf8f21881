"""From pydantic's findings to one error that names the dotted path and the way out."""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lumiere.config.schema import RunConfig
from lumiere.config.synonyms import SYNONYMS, UNAVAILABLE
from lumiere.errors import ConfigError, nearest, printable, shortened

LIMITS = {
    "greater_than": ("gt", "must be more than {}"),
    "greater_than_equal": ("ge", "must be at least {}"),
    "less_than": ("lt", "must be less than {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "literal_error": ("expected", "must be {}"),
}
MAX_LENGTH = 60  # of a value or of a key in a message
MAX_PATHS = 5  # as many keys a message names


def config_error(error: ValidationError) -> ConfigError:
    """The first problem as message and hint, with the paths of the others."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    first, *others = details
    message, hint = describe(first)
    paths = list(dict.fromkeys(path for path in map(dotted_path, others) if path != dotted_path(first)))
    if paths:
        rest = f" and {len(paths) - MAX_PATHS} more" if len(paths) > MAX_PATHS else ""
        message += f" (also wrong: {', '.join(paths[:MAX_PATHS])}{rest})"
    return ConfigError(message, hint)


def describe(detail: ErrorDetails) -> tuple[str, str]:
    """One of pydantic's findings as message and hint."""
    path, value, context = dotted_path(detail), quoted(detail["input"]), detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"unknown key {path}", hint_for_key(path)
        case "inconsistent":
            return f"{path} {detail['msg']}", hint_for_value(path)
        case "model_type" | "model_attributes_type":
            return (
                f"{path} must be a section of keys, not {value}",
                f"write {path}: and its keys below it, indented",
            )
        case "string_unicode" if path not in setting_paths():  # of a key, for which pydantic gives its section's path
            return f"a key{f' of {path}' if path else ''} is not valid text, but {value}", hint_for_key(f"{path}.")
        case "string_type" | "dict_type":
            problem = "must be text"
        case "string_unicode":
            problem = "must be valid text"
        case "list_type":
            problem = "must be a list"
        case "string_too_short":
            problem = "must not be empty"
        case "string_pattern_mismatch":
            problem = "must be auto, cpu, cuda, cuda:<number> or mps"
        case kind if kind in LIMITS:
            key, template = LIMITS[kind]
            problem = template.format(context[key])
            if kind == "literal_error" and (guess := nearest(str(detail["input"]), quoted_names(context[key]))):
                return f"{path} {problem}, not {value}", f"did you mean {guess}?"
        case _:
            problem = detail["msg"]
    return f"{path} {problem}, not {value}", hint_for_value(path)


def dotted_path(detail: ErrorDetails) -> str:
    """`model.num_heads`, without the branches that pydantic adds for unions."""
    if path := detail.get("ctx", {}).get("path"):
        return path
    return ".".join(shortened(printable(str(part)), MAX_LENGTH) for part in detail["loc"][:2])


def hint_for_key(path: str) -> str:
    """Where the value of an unknown key belongs."""
    section, _, leaf = path.rpartition(".")
    leaf = leaf.lower()
    if instead := UNAVAILABLE.get(path.lower()) or UNAVAILABLE.get(leaf):
        return instead
    if leaf in SYNONYMS:
        trainer, ours = SYNONYMS[leaf]
        return f"{trainer}'s {leaf} is {ours} here"
    keys = [key for key in setting_paths() if key.rpartition(".")[2] == leaf]
    if keys and leaf != "name":  # which says too little to be moved to another section
        return f"it belongs to another section: {' or '.join(keys)}"
    in_section = {key.rpartition(".")[2]: key for key in setting_paths() if key.startswith(f"{section}.")}
    anywhere = {key.rpartition(".")[2]: key for key in setting_paths()}
    for candidates in (in_section, anywhere):
        if guess := nearest(leaf, candidates):
            return f"did you mean {candidates[guess]}?"
    names = in_section or dict.fromkeys(RunConfig.model_fields)
    return f"known there: {', '.join(names)}"


def hint_for_value(path: str) -> str:
    """What the key at `path` means, and what it is by default."""
    section, _, leaf = path.partition(".")
    model = RunConfig.model_fields[section].default
    field = type(model).model_fields[leaf]
    meaning = (field.description or "").split("\n")[0]
    default = getattr(model, leaf)
    return f"{path}: {meaning} Default: {'empty' if default in (None, []) else default}"


def quoted_names(text: str) -> list[str]:
    """The choices in pydantic's list of them, `'cosine', 'linear' or 'constant'`."""
    return re.findall(r"'([^']*)'", text)


def setting_paths() -> list[str]:
    """The dotted paths of all settings."""
    sections: dict[str, BaseModel] = {name: field.default for name, field in RunConfig.model_fields.items()}
    return [f"{name}.{leaf}" for name, section in sections.items() for leaf in type(section).model_fields]


def quoted(value: Any) -> str:
    """`value` as short, printable text. Of what is no single value only its kind: a text of it has no bounds."""
    match value:
        case int() if value.bit_length() > 1000:  # Python refuses to write out the largest
            return "a number of hundreds of digits"
        case int() | float() | None:
            return shortened(str(value), MAX_LENGTH)
        case str() | Path():
            return f"'{shortened(printable(str(value)), MAX_LENGTH)}'"
        case _:
            return f"a {type(value).__name__}"
