"""Comparing: what differs, and losses at equal tokens, against values worked out by hand."""

import json
from typing import Any

import pytest

from lumiere.config.loader import dump_config, validate
from lumiere.errors import ConfigError, LumiereError
from lumiere.persistence.catalog import changed_values, compare, config_values, flatten
from lumiere.persistence.metrics import MetricsWriter
from lumiere.persistence.runs import Run, RunStore


def make(store: RunStore, config: dict[str, Any], lines: list[tuple[str, int, float]], **record: Any) -> Run:
    """A run with this config and with lines of metrics: which loss, at how many tokens, how large."""
    run = store.create()
    run.config_path.write_text(dump_config(validate(config)))
    run.update(status="finished", **record)
    with MetricsWriter(run.metrics_path) as writer:
        for step, (key, tokens, loss) in enumerate(lines):
            writer.write({"step": step, "tokens": tokens, "time": tokens / 50, key: loss})
    return run


def test_only_settings_that_differ_are_listed_in_the_order_of_the_schema(store: RunStore) -> None:
    first = make(store, {"training": {"seed": 1, "learning_rate": 0.5}, "model": {"num_layers": 2}}, [])
    second = make(store, {"training": {"seed": 2, "learning_rate": 0.5}, "model": {"num_layers": 3}}, [])
    third = make(store, {"training": {"seed": 2, "learning_rate": 0.5}, "model": {"num_layers": 3}}, [])
    differences = compare([first, second, third]).differences
    assert list(differences.items()) == [("model.num_layers", (2, 3, 3)), ("training.seed", (1, 2, 2))]
    assert compare([second, third]).differences == {}


def test_losses_at_equal_tokens_are_the_last_measured_by_then(store: RunStore) -> None:
    short = make(store, {}, [("loss", 100, 5.0), ("val_loss", 200, 4.0), ("loss", 250, 3.9), ("val_loss", 300, 3.5)])
    long = make(store, {}, [("loss", 240, 4.5), ("val_loss", 240, 4.4), ("loss", 310, 3.0), ("val_loss", 900, 2.0)])
    comparison = compare([short, long])
    assert comparison.common_tokens == 300
    a, b = comparison.runs
    assert a.validation_at is not None
    assert b.validation_at is not None
    assert (a.validation_at.tokens, a.validation_at.loss) == (300, 3.5)
    assert (b.validation_at.tokens, b.validation_at.loss) == (240, 4.4), "measured, not interpolated"
    assert a.training_at is not None
    assert b.training_at is not None
    assert (a.training_at.loss, b.training_at.loss) == (3.9, 4.5)
    assert (a.evaluation["val_loss"], b.evaluation["val_loss"]) == (3.5, 2.0)
    assert b.tokens_per_second == pytest.approx(50)


def test_without_an_evaluation_there_are_no_equal_tokens(store: RunStore) -> None:
    comparison = compare([make(store, {}, [("loss", 100, 5.0)]), make(store, {}, [("val_loss", 200, 4.0)])])
    assert comparison.common_tokens is None
    assert comparison.runs[0].training_at is None
    assert comparison.runs[1].tokens_per_second is None


@pytest.mark.parametrize(
    ("corpora", "same"), [(("a", "a"), True), (("a", "b"), False), (("a", None), None), ((None, None), None)]
)
def test_runs_on_other_corpora_are_told_apart(store: RunStore, corpora: tuple[str, str], same: bool | None) -> None:
    assert compare([make(store, {}, [], corpus_sha256=corpus) for corpus in corpora]).same_corpus is same


def test_a_comparison_needs_two_different_runs(store: RunStore) -> None:
    run = make(store, {}, [])
    for runs in ([], [run], [run, run]):
        with pytest.raises(LumiereError, match="two runs or more"):
            compare(runs)


def test_changed_settings_stand_beside_their_defaults(store: RunStore) -> None:
    run = make(store, {"training": {"seed": 3, "snapshots": False}}, [])
    assert changed_values(run) == {"training.snapshots": (False, True), "training.seed": (3, 0)}


def test_configs_of_other_versions_can_be_looked_at(store: RunStore) -> None:
    run = make(store, {}, [])
    run.config_path.write_text("training: {seed: true, tomorrow: 2030-01-01}\nmodel: 5\nextra: {a: {1: 2}}\n")
    values = config_values(run)
    assert values["training.tomorrow"] == "2030-01-01"
    assert (values["model"], values["extra.a"], values["model.num_layers"]) == ("5", {"1": "2"}, 4)
    json.dumps(values)
    assert changed_values(run)["training.seed"] == ("true", 0)


@pytest.mark.parametrize("content", [b"", b"\xff", b"a: [", b"- 1\n"])
def test_a_damaged_config_is_an_error(store: RunStore, content: bytes) -> None:
    run = make(store, {}, [])
    run.config_path.write_bytes(content)
    with pytest.raises(ConfigError):
        config_values(run)


def test_flatten_goes_two_levels_deep() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1]}, "e": None}) == {"a.b": {"c": 1}, "a.d": [1], "e": None}
