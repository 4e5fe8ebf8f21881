"""Load a `RunConfig` from a YAML or TOML file with `--set` overrides, and write it back as YAML."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli
import yaml
from pydantic import ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from lumiere.config.presets import SUFFIXES, shipped_configs
from lumiere.config.schema import RunConfig
from lumiere.errors import ConfigError, nearest, quoted, shortened
from lumiere.files import read_file

MAX_BYTES = 200_000  # PyYAML takes seconds for this much
"""Maximum characters of a value or key in a message."""
NULL = re.compile("null|Null|NULL|~")
NULL_TAG = "tag:yaml.org,2002:null"


def load_config(
    reference: str | Path, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """Load a config: defaults < file < `overrides` from left to right < `flags`.

    Args:
        reference: A path, or the bare name of a shipped config such as `small`.
        overrides: `section.key=value` texts, as in `--set`.
        flags: Values by dotted path; None means that the flag was not given.

    Raises:
        ConfigError: Names the dotted path and the nearest valid key.
    """
    return validate(given_settings(reference, overrides, flags))


def given_settings(
    reference: str | Path, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what `load_config` reads, as nested mappings and not validated: the settings that the user gave.

    Raises:
        ConfigError: The file cannot be read.
    """
    given = ((key, value) for key, value in (flags or {}).items() if value is not None)
    return replaced(read_config(find_config(reference)), [*map(parse_override, overrides), *given])


def changed_config(values: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> RunConfig:
    """Return the config in `values` with settings replaced by dotted path, from left to right.

    Raises:
        ConfigError: As `validate`.
    """
    return validate(replaced(values, changes))


def replaced(values: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return nested mappings with values replaced by dotted path, from left to right."""
    changed = dict(values)
    for key, value in changes:
        assign(changed, key, value)
    return changed


def load_config_file(path: Path) -> RunConfig:
    """Load the config that a run keeps at `path`."""
    return validate(read_config(path))


def dump_config(config: RunConfig, *, allow_unicode: bool = True) -> str:
    """Return the complete config as YAML; `validate(yaml.safe_load(dump_config(c))) == c`."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=allow_unicode)


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings by dotted path."""
    sections = config.model_dump()
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def validate(values: Mapping[str, Any]) -> RunConfig:
    """Return a `RunConfig` from nested mappings.

    Raises:
        ConfigError: Names the first problem, and the paths of the others.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        from lumiere.config.messages import config_error

        raise config_error(error) from None


def find_config(reference: str | Path) -> Path:
    """Return the path of a config, given as a path or as the bare name of a shipped config."""
    path, shipped = Path(reference), shipped_configs()
    # `os` returns False where methods of `Path` raise: names that are too long, folders without access.
    if os.path.isfile(path):
        return path
    if str(reference) in shipped:
        return shipped[str(reference)]
    if os.path.isdir(path):
        raise ConfigError(f"{quoted(path)} is a folder, not a config", "give a .yaml or .toml file inside it")
    guess = nearest(path.stem, shipped)
    hint = f"did you mean '{guess}'?" if guess else f"give a path, or one of these names: {', '.join(shipped)}"
    raise ConfigError(f"no config {quoted(path)}", hint)


def read_config(path: Path) -> dict[str, Any]:
    """Read the nested mappings of a YAML or TOML file, without validating them."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{quoted(path)} is not a config", f"use a file name that ends in {', '.join(SUFFIXES)}")
    try:
        text = read_file(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{quoted(path)} is not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{quoted(path)} cannot be read: {error.strerror}", "check the path") from None
    try:
        values = tomli.loads(text) if path.suffix == ".toml" else yaml.load(text, UniqueKeyLoader)
    except Exception as error:  # PyYAML also lets errors of its scalar readers through, such as KeyError
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise ConfigError(f"{quoted(path)} cannot be read: {reason}", "fix the file there") from None
    if not values:
        raise ConfigError(f"{quoted(path)} is empty", "start from lumiere train tiny --print-config")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{quoted(path)} holds a {type(values).__name__}, not sections",
            f"a config has the sections {', '.join(RunConfig.model_fields)}",
        )
    return values


def read_value(key: str, value: Any) -> Any:
    """Parse a value as the schema does; return it unchanged if the schema rejects it or has no such dotted key."""
    section, _, leaf = key.partition(".")
    try:
        return type(RunConfig.model_fields[section].default)(**{leaf: value}).model_dump()[leaf]
    except (KeyError, ValidationError):
        return value


def parse_override(override: str) -> tuple[str, Any]:
    """Split `model.num_layers=6` into key and value.

    The value stays text, which the schema parses as it parses values of a file. `null` is None, and text in brackets
    or braces is read as YAML.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {quoted(override)} is not key=value", "for example --set model.num_layers=6")
    if NULL.fullmatch(value):
        return key.strip(), None
    # `[1].txt` is the name of a file, not a list.
    if value.startswith(("[", "{")) and (value.rstrip().endswith(("]", "}")) or not set("]}") & set(value)):
        try:
            return key.strip(), yaml.load(value, UniqueKeyLoader)
        except Exception:  # see read_config
            problem = f"--set {quoted(override)} does not read as a list or mapping"
            raise ConfigError(problem, "for example [a.txt, b.txt]") from None
    return key.strip(), value


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted path, creating sections as needed."""
    *sections, leaf = key.split(".")
    for section in sections:
        child = values.get(section)
        values[section] = values = dict(child) if isinstance(child, dict) else {}
    values[leaf] = value


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader without its surprises.

    YAML 1.1 reads `012` as 10, `1:30` as 90 and `no` as False. Here every scalar but null is text, which the schema
    parses like a value of `--set`. Duplicate keys are rejected, of which PyYAML silently keeps the last; so are aliases
    (`*name`), because a few lines of nested aliases expand to gigabytes (the "billion laughs" attack).
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(None, None, f"*{event.anchor} is an alias: write out its value", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(NULL_TAG, re.compile(rf"(?:{NULL.pattern})?$"))] for first in ("~", "n", "N", "")
}
UniqueKeyLoader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (NULL_TAG, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")), None)
}
