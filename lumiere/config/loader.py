"""From a YAML or TOML file and `--set` overrides to a `RunConfig`, and back to YAML."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli
import yaml
from pydantic import ValidationError
from yaml.composer import ComposerError

from lumiere.config.messages import config_error, quoted
from lumiere.config.presets import SUFFIXES, shipped_configs
from lumiere.config.schema import RunConfig
from lumiere.errors import ConfigError, nearest, shortened
from lumiere.files import read_file

MAX_BYTES = 200_000  # PyYAML takes seconds for them
NULL = re.compile("null|Null|NULL|~")
NULL_TAG = "tag:yaml.org,2002:null"


def load_config(
    reference: str | Path, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """The resolved config: defaults < file < `overrides` from left to right < `flags`.

    Args:
        reference: a path, or the bare name of a config that comes with Lumiere, such as `small`.
        overrides: `section.key=value` texts, as `--set` takes them.
        flags: values by dotted path; None means that the flag was not given.

    Raises:
        ConfigError: for whatever is wrong, naming the dotted path and the nearest valid key.
    """
    path = find_config(reference)
    values = read_config(path)
    for override in overrides:
        key, value = parse_override(override)
        assign(values, key, value)
    for key, value in (flags or {}).items():
        if value is not None:
            assign(values, key, value)
    return validate(values)


def load_config_file(path: Path) -> RunConfig:
    """The config in the file at `path`, as a run keeps it."""
    return validate(read_config(path))


def dump_config(config: RunConfig, *, allow_unicode: bool = True) -> str:
    """The complete config as YAML; `validate(yaml.safe_load(dump_config(c))) == c`."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=allow_unicode)


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted path."""
    sections = config.model_dump()
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def validate(values: Mapping[str, Any]) -> RunConfig:
    """A `RunConfig` from nested mappings.

    Raises:
        ConfigError: naming the first problem, and the paths of the others.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise config_error(error) from None


def find_config(reference: str | Path) -> Path:
    """The file that `reference`, a path or a shipped config's bare name, stands for."""
    path, shipped = Path(reference), shipped_configs()
    # By `os`, which says no where a method of `Path` raises: for a name that is too long, a folder without access.
    if os.path.isfile(path):
        return path
    if str(reference) in shipped:
        return shipped[str(reference)]
    if os.path.isdir(path):
        raise ConfigError(f"{quoted(path)} is a folder, not a config", "give a .yaml or .toml file inside it")
    guess = nearest(path.stem, shipped)
    names = ", ".join(shipped)
    raise ConfigError(
        f"no config {quoted(path)}",
        f"did you mean '{guess}'?" if guess else f"give a path, or one of these names: {names}",
    )


def read_config(path: Path) -> dict[str, Any]:
    """The nested mappings in a YAML or TOML file, not yet validated."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{quoted(path)} is not a config", f"a config's name ends in {', '.join(SUFFIXES)}")
    try:
        text = read_file(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{quoted(path)} is not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{quoted(path)} cannot be read: {error.strerror}", "check the path") from None
    try:
        values = tomli.loads(text) if path.suffix == ".toml" else yaml.load(text, UniqueKeyLoader)
    except Exception as error:  # PyYAML raises whatever its readers of single values run into, such as KeyError
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise ConfigError(f"{quoted(path)} cannot be read: {reason}", "mend the file at that place") from None
    if not values:
        raise ConfigError(f"{quoted(path)} is empty", "start from lumiere train tiny --print-config")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{quoted(path)} holds a {type(values).__name__}, not sections",
            f"a config has the sections {', '.join(RunConfig.model_fields)}",
        )
    return values


def read_value(key: str, value: Any) -> Any:
    """Return a value as the schema reads it; unread if the schema refuses it or has no such dotted key."""
    section, _, leaf = key.partition(".")
    try:
        return getattr(type(RunConfig.model_fields[section].default)(**{leaf: value}), leaf)
    except (KeyError, AttributeError, ValidationError):
        return value


def parse_override(override: str) -> tuple[str, Any]:
    """`model.num_layers=6` as key and value.

    The value stays text, which the schema reads as what the key is, as it reads the values of a file; `null` is the
    empty value, and text within brackets or braces is read as YAML.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {quoted(override)} is not key=value", "for example --set model.num_layers=6")
    if NULL.fullmatch(value):
        return key.strip(), None
    # Not `[1].txt`, which is a file's name.
    if value.startswith(("[", "{")) and (value.rstrip().endswith(("]", "}")) or not set("]}") & set(value)):
        try:
            return key.strip(), yaml.load(value, UniqueKeyLoader)
        except Exception:  # as above
            raise ConfigError(
                f"--set {quoted(override)} does not read as a list or mapping", "for example [a.txt, b.txt]"
            ) from None
    return key.strip(), value


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at the dotted path `key`, making sections on the way."""
    *sections, leaf = key.split(".")
    for section in sections:
        child = values.get(section)
        values[section] = values = dict(child) if isinstance(child, dict) else {}
    values[leaf] = value


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, without what makes a file other than it looks.

    YAML 1.1 reads `012` as 10, `1:30` as 90 and `no` as False. Here every value but null is text, which the schema
    reads as it reads that of `--set`. Of two equal keys PyYAML keeps the last without a word. An alias (`*name`)
    repeats a part of the file, and a few lines of aliases of aliases are gigabytes (the "billion laughs"). This loader
    refuses both.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"*{event.anchor} is an alias: write out what it stands for"
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen = set()
        for key in keys:
            if key.value in seen:
                problem = f"the key {key.value!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(NULL_TAG, re.compile(rf"(?:{NULL.pattern})?$"))] for first in ("~", "n", "N", "")
}
UniqueKeyLoader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (NULL_TAG, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")), None)
}
