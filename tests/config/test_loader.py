"""The config: what is read, in which order, and what is refused with which words."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lumiere.config.loader import (
    dump_config,
    find_config,
    load_config,
    load_config_file,
    read_config,
    validate,
)
from lumiere.config.messages import SYNONYMS, setting_paths
from lumiere.config.presets import shipped_configs
from lumiere.config.schema import RunConfig, json_schema
from lumiere.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"

CARD = {
    "model.embedding_size": 128,
    "model.context_size": 64,
    "model.num_layers": 4,
    "model.num_heads": 4,
    "model.d_key": 32,
    "model.d_value": 32,
    "model.d_ff": 256,
    "model.dropout": 0.1,
    "model.positions": "learned",
    "tokenizer.vocab_size": 4096,
    "dataset.name": "Salesforce/wikitext",
    "dataset.subset": "wikitext-2-raw-v1",
    "dataset.sliding_window_size": 8,
    "training.batch_size": 32,
    "training.learning_rate": 3e-4,
    "training.weight_decay": 0.01,
    "training.gradient_clip_norm": 1.0,
    "training.warmup_steps": 500,
    "training.max_epochs": 250,
    "training.patience": 5,
    "training.stopping_threshold": 1e-4,
    "training.optimizer": "adamw",
    "training.schedule": "cosine",
    "training.precision": "auto",
    "training.compile": False,
}


def value_at(config: RunConfig, path: str) -> Any:
    section, leaf = path.split(".")
    return getattr(getattr(config, section), leaf)


@pytest.mark.parametrize("path", CARD)
def test_small_is_the_card(path: str) -> None:
    assert value_at(load_config("small"), path) == CARD[path]
    section, leaf = path.split(".")
    assert leaf in read_config(CONFIGS / "small.yaml")[section], "every setting of the card stands in the file"


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configs_parse_and_fit_the_schema(name: str) -> None:
    path = shipped_configs()[name]
    assert load_config(name) == load_config(path) == load_config_file(path)
    # As an editor reads it; here every value of a file is text until the schema reads it.
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), json.loads(json_schema()))


def test_schema_file_is_up_to_date() -> None:
    assert (CONFIGS / "schema.json").read_text(encoding="utf-8") == json_schema(), "run `make schema`"


def test_defaults_then_file_then_set_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("training: {max_steps: 1, seed: 1, batch_size: 4}\n")
    config = load_config(
        path, ["training.seed=2", "training.max_steps=2", "training.max_steps=3"], {"training.max_steps": 4}
    )
    assert (config.training.max_steps, config.training.seed, config.training.batch_size) == (4, 2, 4)
    assert config.training.weight_decay == 0.01
    assert load_config(path, flags={"training.max_steps": None}).training.max_steps == 1


def test_toml_equals_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[model]\nnum_layers = 2\n[dataset]\nname = "stories"\n')
    (tmp_path / "a.yaml").write_text("model:\n  num_layers: 2\ndataset:\n  name: stories\n")
    assert load_config(tmp_path / "a.toml") == load_config(tmp_path / "a.yaml")


def test_text_that_reads_as_a_number_counts() -> None:
    # PyYAML reads 3e-4, which has no dot, as text.
    assert isinstance(yaml.safe_load("3e-4"), str)
    assert validate({"training": {"learning_rate": "3e-4", "max_steps": "2e3"}}).training.max_steps == 2000
    assert validate({"training": {"seed": "9007199254740993"}}).training.seed == 9007199254740993


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("wandb", ["wandb"]),
        ("tensorboard, wandb", ["tensorboard", "wandb"]),
        ("[tensorboard]", ["tensorboard"]),
        ("[]", []),
        ("null", []),
    ],
)
def test_names_may_be_a_list_or_a_text(text: str, names: list[str]) -> None:
    assert load_config("tiny", [f"training.loggers={text}"]).training.loggers == names


# What a text is to a setting of each kind, in a file and after --set: None stands for a refusal.
TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("12", {"integer": 12, "number": 12.0, "boolean": None, "text": "12"}),
    ("+12", {"integer": 12, "number": 12.0, "boolean": None, "text": "+12"}),
    ("0", {"integer": 0, "number": 0.0, "boolean": None, "text": "0"}),
    ("1_000", {"integer": 1000, "number": 1000.0, "boolean": None, "text": "1_000"}),
    ("2e3", {"integer": 2000, "number": 2000.0, "boolean": None, "text": "2e3"}),
    ("3e-4", {"integer": None, "number": 3e-4, "boolean": None, "text": "3e-4"}),
    ("2.", {"integer": 2, "number": 2.0, "boolean": None, "text": "2."}),
    (".5", {"integer": None, "number": 0.5, "boolean": None, "text": ".5"}),
    ("0.5", {"integer": None, "number": 0.5, "boolean": None, "text": "0.5"}),
    *(
        (text, {"integer": None, "number": None, "boolean": None, "text": text})
        for text in (
            "012", "00", "00.5", "0_1", "1__", "1:30", "1:30:00", "1:30.5", "0x10", "0o7", "0b1", "1e", ".inf", "-.inf",
            ".nan", "inf", "nan", "1e999", "2020-01-01", "2020-01-01 10:00:00", "yes", "no", "on", "off", "y", "1,5",
            "1 000", "١٢", "12a", "=", "<<",
        )
    ),
    *((text, {"integer": None, "number": None, "boolean": True, "text": text}) for text in ("true", "True", "TRUE")),
    ("false", {"integer": None, "number": None, "boolean": False, "text": "false"}),
    *((text, {"integer": None, "number": None, "boolean": None, "text": None}) for text in ("null", "~", "Null")),
]  # fmt: skip
KINDS = {
    "integer": ("training", "warmup_steps"),
    "number": ("training", "stopping_threshold"),
    "boolean": ("training", "compile"),
    "text": ("dataset", "name"),
}


@pytest.mark.parametrize(("text", "meanings"), TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_and_set_read_the_same_texts_alike(
    tmp_path: Path, text: str, meanings: dict[str, Any], kind: str
) -> None:
    section, key = KINDS[kind]
    (tmp_path / "a.yaml").write_text(f"{section}:\n  {key}: {text}\n", encoding="utf-8")
    (tmp_path / "empty.yaml").write_text("model: {}\n")

    def meaning(reference: str, *overrides: str) -> Any:
        try:
            return value_at(load_config(tmp_path / reference, overrides), f"{section}.{key}")
        except ConfigError:
            return None

    found = meaning("a.yaml"), meaning("empty.yaml", f"{section}.{key}={text}")
    assert found == (meanings[kind],) * 2
    assert all(type(value) is type(meanings[kind]) for value in found)


@pytest.mark.parametrize("text", ["null", "~", "none", "Null"])
def test_the_empty_value_in_a_file_and_after_set(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(f"training:\n  patience: {text}\n")
    assert load_config(tmp_path / "a.yaml").training.patience is None
    assert load_config("small", [f"training.patience={text}"]).training.patience is None


def test_a_name_that_begins_with_a_bracket_is_no_list() -> None:
    for name in ("[1].txt", "[draft] a.txt", "{a}.csv"):
        assert load_config("tiny", [f"dataset.data_files={name}"]).dataset.data_files == name


def test_thousands_of_unknown_keys_are_refused_by_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("".join(f"k{i}: 1\n" for i in range(14_000)))
    with pytest.raises(ConfigError, match="unknown key k0"):
        load_config(tmp_path / "a.yaml")


def test_set_reads_lists_mappings_and_null() -> None:
    config = load_config("tiny", ["dataset.data_files=[a.txt, b.txt]", "training.patience=null"])
    assert config.dataset.data_files == ["a.txt", "b.txt"]
    assert config.training.patience is None
    config = load_config("tiny", ["dataset.data_files.train=a.txt", "dataset.data_files.test=b.txt"])
    assert config.dataset.data_files == {"train": "a.txt", "test": "b.txt"}


REFUSED = [
    ("model.n_embd=3", "unknown key model.n_embd", "nanoGPT's n_embd is model.embedding_size here"),
    ("model.num_layer=3", "unknown key model.num_layer", "did you mean model.num_layers?"),
    ("model.vocab_size=9", "unknown key model.vocab_size", "it belongs to another section: tokenizer.vocab_size"),
    ("learning_rate=1", "unknown key learning_rate", "training.learning_rate"),
    ("modle.d_ff=1", "unknown key modle", "model"),
    ("model.num_heads=0", "model.num_heads must be at least 1, not '0'", "Attention heads"),
    ("model.dropout=1.5", "model.dropout must be less than 1, not '1.5'", "Default: 0.1"),
    ("model.dropout=-0.1", "model.dropout must be at least 0", ""),
    ("training.learning_rate=nan", "training.learning_rate must be a number, not 'nan'", ""),
    ("training.learning_rate=1e999", "training.learning_rate must be a finite number", ""),
    ("model.num_layers=yes", "model.num_layers must be a whole number, not 'yes'", ""),
    ("model.num_layers=2.5", "model.num_layers must be a whole number, not '2.5'", ""),
    ("training.compile=1", "training.compile must be true or false, not '1'", ""),
    ("training.optimizer=sgd", "training.optimizer must be 'adamw' or 'muon', not 'sgd'", ""),
    ("training.device=gpu", "training.device must be auto, cpu", ""),
    ("dataset.name=", "dataset.name must not be empty", ""),
    ("dataset.document_start=(", "dataset.document_start must be a regular expression", ""),
    ("dataset.sliding_window_size=64", "dataset.sliding_window_size must be smaller than model.context_size (64)", ""),
    ("model.d_ff=1000001", "model.d_ff must be at most 1000000, not '1000001'", ""),
    ("model.num_layers=1001", "model.num_layers must be at most 1000, not '1001'", ""),
    ("training.max_steps=1e30", "training.max_steps must be at most 9223372036854775807", ""),
    ("training.device=cuda:" + "9" * 5000, "training.device must be auto, cpu", ""),
    ("." * 50_000 + "=1", "unknown key ", "known there"),
    ("model.\udc80=1", "a key of model is not valid text", ""),
    ("dataset.data_files=" + "[" * 5000, "does not read as a list or mapping", ""),
    ("dataset.data_files={? [a] : b}", "does not read as a list or mapping", ""),
    ("dataset.data_files=[&a x, *a]", "does not read as a list or mapping", ""),
    ("model=3", "model must be a section of keys, not '3'", ""),
    ("training.gradient_accumulation_steps=5", "must divide training.batch_size (32)", ""),
    ("seed", "--set 'seed' is not key=value", "--set model.num_layers=6"),
    ("dataset.data_files=[a", "--set 'dataset.data_files=[a' does not read as a list", ""),
]


@pytest.mark.parametrize(("override", "message", "hint"), REFUSED)
def test_refused_override(override: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("small", [override])
    assert message in caught.value.message
    assert caught.value.hint
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"num_layers": True}}, "model.num_layers must be a whole number, not True"),
        ({"model": {"dropout": False}}, "model.dropout must be a number, not False"),
        ({"training": {"learning_rate": math.nan}}, "must be a finite number, not nan"),
        ({"training": {"learning_rate": math.inf}}, "must be a finite number, not inf"),
        ({"training": {"seed": 10**400}}, "training.seed must be less than"),
        ({"training": {"learning_rate": 10**400}}, "must be a finite number"),
        ({"dataset": {"name": 3}}, "dataset.name must be text, not 3"),
        ({"model": {"d_key": 3, "positions": "rotary"}}, "model.d_key must be even"),
        ({"model": {"d_ff": "\x1b[31m8"}}, "not '\\x1b[31m8'"),
    ],
)
def test_refused_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(values)
    assert message in caught.value.message


def test_all_problems_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown key model\.n_head \(also wrong: model\.d_ff, training\.seed\)"):
        validate({"model": {"d_ff": 0, "n_head": 1}, "training": {"seed": -1}})


def test_every_synonym_teaches_a_key_that_exists() -> None:
    paths = setting_paths()
    for name, (_, ours) in SYNONYMS.items():
        assert ours in paths
        assert name not in {path.rpartition(".")[2] for path in paths}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"", "is empty"),
        ("a.yaml", b"# nothing\n", "is empty"),
        ("a.yaml", b"- model\n- tokenizer\n", "holds a list, not sections"),
        ("a.yaml", b"\xff\xfe\x00", "is not UTF-8 text (byte 0)"),
        ("a.yaml", b"model: {d_ff: 1, d_ff: 2}\n", "the key 'd_ff' stands there twice"),
        ("a.yaml", b"model: [\n", "cannot be read"),
        ("a.yaml", b"[" * 10_000, "cannot be read"),
        ("a.yaml", b"#" * 200_001, "cannot be read: More than 200,000 bytes"),
        ("a.yaml", b"a: &a [x]\nb: &b [*a, *a]\n", "*a is an alias: write out what it stands for"),
        ("a.yaml", b"dataset: {data_files: &a [*a]}\n", "is an alias"),
        ("a.yaml", b"? [a]\n: b\n", "unhashable key"),
        ("a.yaml", b"model: {d_ff: !!int ''}\n", "cannot be read"),
        ("a.yaml", b"model: {d_ff: !!bool x}\n", "cannot be read"),
        ("a.yaml", b"model: {d_ff: !!timestamp x}\n", "cannot be read"),
        ("a.yaml", b"model: !!map [a]\n", "cannot be read"),
        ("a.yaml", b"model: {d_ff: 1" + b":00" * 30_000 + b".5}\n", "model.d_ff must be a whole number"),
        ("a.yaml", b"model: {d_ff: " + b"9" * 100_000 + b"}\n", "model.d_ff must be a whole number"),
        ("a.yaml", b"model: {d_ff: 0x" + b"f" * 10_000 + b"}\n", "model.d_ff must be a whole number"),
        ("a.yaml", b"model: {d_ff: !!int '012'}\n", "cannot be read"),
        ("a.yaml", b"1: 2\n", "unknown key 1"),
        ("a.yaml", b"model: {1: 2}\n", "unknown key model.1"),
        ("a.yaml", b'model: {"\\ud800": 1}\n', "a key of model is not valid text, but '\\ud800'"),
        ("a.yaml", b'"\\ud800": 1\n', "a key is not valid text"),
        ("a.yaml", b'dataset: {name: "\\ud800"}\n', "dataset.name must be valid text"),
        ("a.yaml", b"dataset: {name: !!binary gAA=}\n", "cannot be read"),
        ("a.yaml", b"model: 2020-01-01\n", "model must be a section of keys, not '2020-01-01'"),
        ("a.yaml", b"a" * 1000 + b": 1\n", "unknown key aaaaaaaa"),
        ("a.yaml", b"".join(b"k%d: 1\n" % i for i in range(99)), "(also wrong: k1, k2, k3, k4, k5 and 93 more)"),
        ("a.yaml", b"model: {d_ff: '" + b"1" * 150_000 + b"x'}\n", "must be a whole number, not '1111"),
        ("a.toml", b"[" + b"a." * 900 + b"a]\nb = 1\n", "unknown key a"),
        ("a.toml", b"a = " + b"[" * 10_000, "cannot be read"),
        ("a.toml", b"a = 1\na = 2\n", "cannot be read"),
        ("a.toml", b"a = " + b"9" * 10_000 + b"\n", "cannot be read"),
        ("a.toml", b"model = \n", "cannot be read"),
        ("a.txt", b"model: {}\n", "is not a config"),
    ],
)
def test_refused_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name)
    assert message in caught.value.message
    assert caught.value.hint
    assert len(str(caught.value)) < 1000


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    for name, text in (("a.yaml", "model: {d_ff: 8}\n"), ("a.toml", "[model]\nd_ff = 8\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_config(tmp_path / name).model.d_ff == 8


def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="no config"):
        load_config(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Not a regular file"):
        load_config_file(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("reference", ["a" * 5000 + ".yaml", "a\0b.yaml", "/proc/1/root/x.yaml", "\x1b[31m.yaml"])
def test_a_name_that_no_file_can_have(reference: str) -> None:
    with pytest.raises(ConfigError, match="no config"):
        load_config(reference)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("(" * 9000, "recursion"), ("a{99999999999999999999}", "too large"), ("[[a", "unterminated")],
)
def test_a_pattern_that_does_not_compile(pattern: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset.document_start must be a regular expression \(.*{reason}"):
        validate({"dataset": {"document_start": pattern}})


def test_a_pattern_that_a_later_python_reads_otherwise_is_read_without_a_word() -> None:
    assert validate({"dataset": {"document_start": "[[a]"}}).dataset.document_start == "[[a]"


def test_missing_config_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("configs/smal.yaml")
    assert caught.value.hint == "did you mean 'small'?"
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


def test_a_folder_does_not_hide_a_shipped_config(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    assert find_config("small").name == "small.yaml"


configs = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries(
            {},
            optional={
                "embedding_size": st.integers(1, 4096),
                "dropout": st.floats(0, 1, exclude_max=True),
                "positions": st.sampled_from(["learned", "rotary"]),
            },
        ),
        "dataset": st.fixed_dictionaries(
            {},
            optional={
                "name": st.text(min_size=1, max_size=20).filter(str.isprintable),
                "subset": st.none() | st.text(max_size=20).filter(str.isprintable),
                "data_files": st.none() | st.lists(st.text(st.characters(codec="ascii"), max_size=8), max_size=3),
            },
        ),
        "training": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": st.floats(1e-300, 1e300),
                "max_steps": st.none() | st.integers(1, 2**62),
                "compile": st.booleans(),
            },
        ),
    },
)


@given(configs)
def test_dump_and_parse_are_inverse(values: dict[str, Any]) -> None:
    config = validate(values)
    assert validate(yaml.safe_load(dump_config(config))) == config


@given(st.text(max_size=40) | st.builds("{}={}".format, st.sampled_from(setting_paths()), st.text(max_size=20)))
def test_any_override_gives_a_config_or_an_error_of_ours(override: str) -> None:
    outcome: RunConfig | str
    try:
        outcome = load_config("tiny", [override])
    except ConfigError as error:
        outcome = error.message
    assert isinstance(outcome, RunConfig) or outcome.isprintable()
