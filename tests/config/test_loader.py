"""The config: what is read, in which order, and what is rejected, naming the key, the value and the fix."""

import json
import math
import os
from collections.abc import Callable
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
    flat_settings,
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
    "model": {
        "embedding_size": 128, "context_size": 64, "num_layers": 4, "num_heads": 4, "d_key": 32, "d_value": 32,
        "d_ff": 256, "dropout": 0.1, "positions": "learned",
    },
    "tokenizer": {"vocab_size": 4096},
    "dataset": {"name": "Salesforce/wikitext", "subset": "wikitext-2-raw-v1", "sliding_window_size": 8},
    "training": {
        "batch_size": 32, "learning_rate": 3e-4, "weight_decay": 0.01, "gradient_clip_norm": 1.0, "warmup_steps": 500,
        "max_epochs": 250, "patience": 5, "stopping_threshold": 1e-4, "optimizer": "adamw", "schedule": "cosine",
        "precision": "auto", "compile": False,
    },
}  # fmt: skip


def test_small_is_the_original_model_card() -> None:
    settings, written = load_config("small").model_dump(), read_config(CONFIGS / "small.yaml")
    for section, values in CARD.items():
        assert settings[section] == settings[section] | values
        assert values.keys() <= written[section].keys(), "every setting of the card is written in the file"


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configs_parse_and_fit_the_schema(name: str) -> None:
    path = shipped_configs()[name]
    assert load_config(name) == load_config(path) == load_config_file(path)
    # As an editor reads it: here every value of a file is text until the schema parses it.
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), json.loads(json_schema()))


def test_schema_file_is_up_to_date() -> None:
    assert (CONFIGS / "schema.json").read_text(encoding="utf-8") == json_schema(), "run `make schema`"


def test_defaults_then_file_then_set_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("training: {max_steps: 1, seed: 1, batch_size: 4}\n")
    overrides = ["training.seed=2", "training.max_steps=2", "training.max_steps=3"]
    config = load_config(path, overrides, {"training.max_steps": 4})
    assert (config.training.max_steps, config.training.seed, config.training.batch_size) == (4, 2, 4)
    assert config.training.weight_decay == 0.01
    assert load_config(path, flags={"training.max_steps": None}).training.max_steps == 1


def test_toml_equals_yaml_and_byte_order_marks_do_no_harm(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.toml").write_text('[model]\nnum_layers = 2\n[dataset]\nname = "chains"\n', encoding)
        (tmp_path / "a.yaml").write_text("model:\n  num_layers: 2\ndataset:\n  name: chains\n", encoding)
        config = load_config(tmp_path / "a.toml")
        assert config == load_config(tmp_path / "a.yaml")
        assert (config.model.num_layers, config.dataset.name) == (2, "chains")


# How each text reads as an integer, a number, a boolean and text, in a file and after --set. None: refused.
TEXTS: dict[str, tuple[int | None, float | None, bool | None, str | None]] = {
    "12": (12, 12.0, None, "12"),
    "+12": (12, 12.0, None, "+12"),
    "0": (0, 0.0, None, "0"),
    "1_000": (1000, 1000.0, None, "1_000"),
    "2e3": (2000, 2000.0, None, "2e3"),
    "9007199254740993": (9007199254740993, float(9007199254740993), None, "9007199254740993"),
    "3e-4": (None, 3e-4, None, "3e-4"),
    "2.": (2, 2.0, None, "2."),
    ".5": (None, 0.5, None, ".5"),
    "0.5": (None, 0.5, None, "0.5"),
    **dict.fromkeys(("null", "~", "Null"), (None, None, None, None)),
    **{text: (None, None, True, text) for text in ("true", "True", "TRUE")},
    "false": (None, None, False, "false"),
    **{
        text: (None, None, None, text)
        for text in (
            "012", "00", "00.5", "0_1", "1__", "1:30", "1:30:00", "1:30.5", "0x10", "0o7", "0b1", "1e", ".inf", "-.inf",
            ".nan", "inf", "nan", "1e999", "2020-01-01", "2020-01-01 10:00:00", "yes", "no", "on", "off", "y", "1,5",
            "1 000", "١٢", "12a", "=", "<<",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "key"),
    list(enumerate(["training.warmup_steps", "training.stopping_threshold", "training.compile", "dataset.name"])),
)
def test_a_file_and_set_parse_texts_alike(tmp_path: Path, column: int, key: str) -> None:
    section, leaf = key.split(".")
    (tmp_path / "empty.yaml").write_text("model: {}\n")

    def parsed(reference: str, *overrides: str) -> Any:
        try:
            return flat_settings(load_config(tmp_path / reference, overrides))[key]
        except ConfigError:
            return None

    for text, meanings in TEXTS.items():
        (tmp_path / "a.yaml").write_text(f"{section}:\n  {leaf}: {text}\n", encoding="utf-8")
        found = parsed("a.yaml"), parsed("empty.yaml", f"{key}={text}")
        assert found == (meanings[column],) * 2, text
        assert all(type(value) is type(meanings[column]) for value in found), text


@pytest.mark.parametrize(
    ("key", "texts", "value"),
    [
        ("training.loggers", ["wandb", "[wandb]"], ["wandb"]),
        ("training.loggers", ["tensorboard, wandb", "[tensorboard, wandb]"], ["tensorboard", "wandb"]),
        ("training.loggers", ["[]", "null"], []),
        ("training.patience", ["null", "~", "none", "Null"], None),
        ("dataset.data_files", ["[a.txt, b.txt]"], ["a.txt", "b.txt"]),
        ("dataset.data_files", ["{train: a, test: b}"], {"train": "a", "test": "b"}),
        *(("dataset.data_files", [name], name) for name in ("[1].txt", "[draft] a.txt", "{a}.csv")),
    ],
)
def test_nulls_lists_mappings_and_names_with_brackets(key: str, texts: list[str], value: Any) -> None:
    for text in texts:
        assert flat_settings(load_config("tiny", [f"{key}={text}"]))[key] == value


def test_overrides_below_a_setting_make_a_mapping() -> None:
    config = load_config("tiny", ["dataset.data_files.train=a", "dataset.data_files.test=b"])
    assert config.dataset.data_files == {"train": "a", "test": "b"}


REFUSED = [
    ("model.n_embd=3", "model.n_embd", "nanoGPT's n_embd is model.embedding_size"),
    ("model.num_layer=3", "model.num_layer", "model.num_layers"),
    ("model.vocab_size=9", "model.vocab_size", "tokenizer.vocab_size"),
    ("learning_rate=1", "learning_rate", "training.learning_rate"),
    ("modle.d_ff=1", "modle", "model"),
    ("model.num_heads=0", "model.num_heads must be at least 1, got '0'", "Default: 4"),
    ("model.dropout=1.5", "model.dropout must be less than 1, got '1.5'", "Default: 0.1"),
    ("model.dropout=-0.1", "model.dropout must be at least 0", ""),
    ("training.learning_rate=1e999", "training.learning_rate", ""),
    ("training.optimizer=sgd", "training.optimizer must be 'adamw' or 'muon', got 'sgd'", ""),
    ("training.device=gpu", "training.device", ""),
    ("dataset.name=", "dataset.name", ""),
    ("dataset.document_start=(", "dataset.document_start", ""),
    ("dataset.document_start=" + "(" * 9000, "dataset.document_start", ""),
    ("dataset.document_start=a{99999999999999999999}", "dataset.document_start", ""),
    ("dataset.document_start=[[a", "dataset.document_start", ""),
    ("dataset.sliding_window_size=64", "model.context_size (64)", "dataset.sliding_window_size"),
    ("model.d_ff=1000001", "model.d_ff must be at most 1000000, got '1000001'", ""),
    ("model.num_layers=1001", "model.num_layers must be at most 1000, got '1001'", ""),
    ("training.max_steps=1e30", "training.max_steps must be at most 9223372036854775807", ""),
    ("training.device=cuda:" + "9" * 5000, "training.device", ""),
    ("." * 50_000 + "=1", "unknown key ", "model, tokenizer, dataset, training"),
    ("model.\udc80=1", "a key of model", ""),
    ("dataset.data_files=" + "[" * 2000, "--set 'dataset.data_files=", ""),
    ("dataset.data_files={? [a] : b}", "--set 'dataset.data_files=", ""),
    ("dataset.data_files=[&a x, *a]", "--set 'dataset.data_files=", ""),
    ("dataset.data_files=[a", "--set 'dataset.data_files=[a'", ""),
    ("model=3", "model must be a section of keys, got '3'", ""),
    ("training.gradient_accumulation_steps=5", "training.batch_size (32)", "training.gradient_accumulation_steps"),
    ("seed", "--set 'seed'", "--set model.num_layers=6"),
]
REFUSED_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"model": {"num_layers": True}}, "model.num_layers must be a whole number, got True"),
    ({"model": {"dropout": False}}, "model.dropout must be a number, got False"),
    ({"training": {"learning_rate": math.nan}}, "training.learning_rate must be a finite number, got nan"),
    ({"training": {"learning_rate": math.inf}}, "training.learning_rate must be a finite number, got inf"),
    ({"training": {"seed": 10**400}}, "training.seed must be less than"),
    ({"training": {"learning_rate": 10**400}}, "training.learning_rate must be a finite number"),
    ({"dataset": {"name": 3}}, "dataset.name must be text, got 3"),
    ({"model": {"d_key": 3, "positions": "rotary"}}, "model.d_key must be even"),
    ({"model": {"d_ff": "\x1b[31m8"}}, "got '\\x1b[31m8'"),
    ({"model": {"d_ff": 0, "n_head": 1}, "training": {"seed": -1}}, "model.n_head (also wrong: model.d_ff, training."),
]


def assert_refused(load: Callable[[], object], message: str, hint: str = "") -> None:
    with pytest.raises(ConfigError) as caught:
        load()
    assert message in caught.value.message
    assert caught.value.hint
    assert hint in caught.value.hint
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("override", "message", "hint"), REFUSED)
def test_refused_overrides_name_key_value_and_fix(override: str, message: str, hint: str) -> None:
    assert_refused(lambda: load_config("small", [override]), message, hint)


@pytest.mark.parametrize(("values", "message"), REFUSED_VALUES)
def test_refused_values_name_key_and_value(values: dict[str, Any], message: str) -> None:
    assert_refused(lambda: validate(values), message)


def test_patterns_that_a_later_python_may_read_differently_raise_no_warning() -> None:
    assert validate({"dataset": {"document_start": "[[a]"}}).dataset.document_start == "[[a]"


def test_every_synonym_names_a_setting_that_exists() -> None:
    assert {ours for _, ours in SYNONYMS.values()} <= set(setting_paths())
    assert not SYNONYMS.keys() & {path.rpartition(".")[2] for path in setting_paths()}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(("a.yaml", content, "a.yaml'") for content in (b"", b"# nothing\n", b"- model\n- a\n", b"model: [\n")),
        *(("a.toml", content, "a.toml'") for content in (b"a = 1\na = 2\n", b"model = \n", b"a = " + b"[" * 2000)),
        ("a.toml", b"a = " + b"9" * 10_000 + b"\n", "a.toml'"),
        ("a.yaml", b"\xff\xfe\x00", "(byte 0)"),
        ("a.yaml", b"model: {d_ff: 1, d_ff: 2}\n", "'d_ff'"),
        ("a.yaml", b"[" * 2000, "a.yaml'"),
        ("a.yaml", b"#" * 200_001, "200,000 bytes"),
        ("a.yaml", b"a: &a [x]\nb: &b [*a, *a]\n", "*a is an alias"),
        ("a.yaml", b"dataset: {data_files: &a [*a]}\n", "is an alias"),
        *(
            ("a.yaml", content, "cannot be read")
            for content in (
                b"? [a]\n: b\n", b"model: {d_ff: !!int ''}\n", b"model: {d_ff: !!bool x}\n",
                b"model: {d_ff: !!timestamp x}\n", b"model: !!map [a]\n", b"model: {d_ff: !!int '012'}\n",
                b"dataset: {name: !!binary gAA=}\n",
            )
        ),
        *(
            ("a.yaml", b"model: {d_ff: '" + text + b"'}\n", "model.d_ff must be a whole number")
            for text in (b"1" + b":00" * 30_000 + b".5", b"9" * 100_000, b"0x" + b"f" * 10_000, b"1" * 150_000 + b"x")
        ),
        ("a.yaml", b"1: 2\n", "unknown key 1"),
        ("a.yaml", b"model: {1: 2}\n", "unknown key model.1"),
        ("a.yaml", b'model: {"\\ud800": 1}\n', "a key of model"),
        ("a.yaml", b'"\\ud800": 1\n', "a key is not valid text"),
        ("a.yaml", b'dataset: {name: "\\ud800"}\n', "dataset.name must be valid text"),
        ("a.yaml", b"model: 2020-01-01\n", "model must be a section of keys, got '2020-01-01'"),
        ("a.yaml", b"a" * 1000 + b": 1\n", "unknown key aaaaaaaa"),
        ("a.yaml", b"".join(b"k%d: 1\n" % i for i in range(1000)), "k0 (also wrong: k1, k2, k3, k4, k5 and 994"),
        ("a.toml", b"[" + b"a." * 900 + b"a]\nb = 1\n", "unknown key a"),
        ("a.txt", b"model: {}\n", "a.txt'"),
    ],
)  # fmt: skip
def test_refused_files(name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    assert_refused(lambda: load_config(name), message)


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        *((name, "no config", "") for name in ("a" * 5000 + ".yaml", "a\0b.yaml", "\x1b[31m.yaml", "fifo")),
        ("/proc/1/root/x.yaml", "no config", ""),
        ("configs/smal.yaml", "smal", "'small'"),
        (".", "is a folder", ""),
    ],
)
def test_names_that_are_no_file_are_refused_at_once(reference: str, message: str, hint: str) -> None:
    os.mkfifo("fifo")
    assert_refused(lambda: load_config(reference), message, hint)


def test_a_pipe_is_not_read_and_a_folder_hides_no_shipped_config() -> None:
    os.mkfifo("pipe.yaml")
    assert_refused(lambda: load_config_file(Path("pipe.yaml")), "Not a regular file")
    Path("small").mkdir()
    assert find_config("small").name == "small.yaml"


printable = st.text(min_size=1, max_size=20).filter(str.isprintable)
files = st.lists(st.text(st.characters(codec="ascii"), max_size=8), max_size=3)
SETTINGS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {
        "embedding_size": st.integers(1, 4096),
        "dropout": st.floats(0, 1, exclude_max=True),
        "positions": st.sampled_from(["learned", "rotary"]),
    },
    "dataset": {"name": printable, "subset": st.none() | printable, "data_files": st.none() | files},
    "training": {
        "learning_rate": st.floats(1e-300, 1e300),
        "max_steps": st.none() | st.integers(1, 2**62),
        "compile": st.booleans(),
    },
}


@given(st.fixed_dictionaries({name: st.fixed_dictionaries({}, optional=keys) for name, keys in SETTINGS.items()}))
def test_dump_and_parse_are_inverse(values: dict[str, Any]) -> None:
    config = validate(values)
    assert validate(yaml.safe_load(dump_config(config))) == config


@given(st.text(max_size=40) | st.builds("{}={}".format, st.sampled_from(setting_paths()), st.text(max_size=20)))
def test_any_override_gives_a_config_or_a_printable_error(override: str) -> None:
    outcome: RunConfig | str
    try:
        outcome = load_config("tiny", [override])
    except ConfigError as error:
        outcome = error.message
    assert isinstance(outcome, RunConfig) or outcome.isprintable()
