"""The config of a fine-tuned run: what it has from its parent, and what it may not say otherwise."""

import shlex
from typing import Any

import pytest

from lumiere.config.inheritance import inherit
from lumiere.config.loader import given_settings, parse_override, replaced
from lumiere.config.schema import RunConfig
from lumiere.errors import ConfigError
from tests.training.short import short

PARENT = short({"model.attention_windows": [None], "model.dropout": 0.1, "tokenizer.normalizer": "nfc"})


def test_model_and_tokenizer_are_the_parents_and_the_rest_is_its_own() -> None:
    found = inherit({"training": {"max_steps": "7"}, "dataset": {"seed": 5}}, PARENT, "a")
    assert (found.model, found.tokenizer) == (PARENT.model, PARENT.tokenizer)
    assert (found.training.max_steps, found.dataset.seed) == (7, 5)
    defaults = RunConfig()
    assert found.training.batch_size == defaults.training.batch_size != PARENT.training.batch_size
    assert found.dataset.num_documents == defaults.dataset.num_documents != PARENT.dataset.num_documents


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"embedding_size": "16", "norm": "rms", "attention_windows": ["none"], "norm_epsilon": "1e-6"}),
        ("model", {"num_key_value_heads": None, "d_key": 8, "attention_scale": "none"}),
        ("model", {"dropout": "0.3", "zero_output_init": "true"}),
        ("tokenizer", {"vocab_size": "3.2e2", "normalizer": "nfc"}),
    ],
)
def test_equal_values_in_any_spelling_and_settings_without_effect_are_no_conflict(
    section: str, values: dict[str, Any]
) -> None:
    found = inherit({section: values}, PARENT, "a")
    free = {"dropout", "zero_output_init"}
    assert found.model.model_dump(exclude=free) == PARENT.model.model_dump(exclude=free)
    assert found.tokenizer == PARENT.tokenizer
    assert found.model.dropout == float(values.get("dropout", PARENT.model.dropout))
    assert found.model.zero_output_init == ("zero_output_init" in values)


@pytest.mark.parametrize(
    ("given", "differences", "values"),
    [
        ({"model": {"num_layers": "2"}}, "model.num_layers is 1, not 2", "--set model.num_layers=1"),
        (
            {"model": {"attention_windows": "3"}},
            "model.attention_windows is [null], not 3",
            "--set 'model.attention_windows=[null]'",
        ),
        ({"model": {"attention_scale": "1"}}, "model.attention_scale is null, not 1", "model.attention_scale=null"),
        (
            {"model": {"d_key": "x", "norm": "layer"}, "tokenizer": {"vocab_size": 321}},
            "model.d_key is 8, not x, model.norm is rms, not layer, tokenizer.vocab_size is 320, not 321",
            "--set model.d_key=8 --set model.norm=rms --set tokenizer.vocab_size=320",
        ),
        (
            {"model": {"rotary_scaling": {"type": "linear", "factor": "2"}}},
            "model.rotary_scaling is null, not {type: linear, factor: 2}",
            "--set model.rotary_scaling=null",
        ),
        # A default that is spelled out is set.
        ({"tokenizer": {"normalizer": "nfkc"}}, "tokenizer.normalizer is nfc, not nfkc", "normalizer=nfc"),
    ],
)
def test_other_values_are_refused_by_name(given: dict[str, Any], differences: str, values: str) -> None:
    with pytest.raises(ConfigError) as caught:
        inherit(given, PARENT, "abcd1234")
    assert "abcd1234" in caught.value.message
    assert caught.value.message.endswith(differences)
    assert (caught.value.hint or "").endswith(values)


SCALED = {"model.positions": "rotary", "model.rotary_scaling": {"type": "linear", "factor": 2.0}}


@pytest.mark.parametrize("parent", [PARENT, short(SCALED)])
def test_the_values_in_the_hint_are_those_to_set(parent: RunConfig) -> None:
    """What the error of one attempt says makes the next one work."""
    given = given_settings("tiny", ["model.positions=none", "model.rotary_scaling=null"])
    with pytest.raises(ConfigError) as caught:
        inherit(given, parent, "a")
    command = (caught.value.hint or "").partition("values: ")[2]
    overrides = [part for part in shlex.split(command) if part != "--set"]
    assert inherit(replaced(given, map(parse_override, overrides)), parent, "a").model == parent.model.model_copy(
        update={"dropout": 0.0, "zero_output_init": True}
    )


@pytest.mark.parametrize("given", [{"model": {"num_head": 4}}, {"model": 3}, {"tokenizer": []}, {"data": {}}])
def test_what_no_config_has_is_refused_as_ever(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"unknown key|must be a section"):
        inherit(given, PARENT, "a")
