"""Hints at settings, commands and options: they name what exists, and nothing with another meaning."""

import re

import pytest
import typer

from lumiere.cli import app
from lumiere.cli.usage import COMMANDS_ELSEWHERE, OPTIONS_ELSEWHERE
from lumiere.config.messages import SYNONYMS, UNAVAILABLE, hint_for_key, setting_paths
from lumiere.errors import edits, nearest
from tests.cli.commands import refuse


@pytest.mark.parametrize(
    ("key", "instead", "not_named"),
    [
        ("tokenizer.name=gpt2", "tokenizer.path", "dataset"),
        ("model.name=gpt2", "architecture", "dataset"),
        ("model.n_kv_head=2", "model.num_key_value_heads", "did you mean"),
        ("model.activation=gelu", "model.feedforward", "did you mean"),
        ("model.rope_theta=100", "model.rotary_base", "did you mean"),
        ("tie_word_embeddings=true", "model.tie_embeddings", "did you mean"),
        ("model.init_from=gpt2", "--from", "did you mean"),
        ("model.n_layr=2", "num_layers", "dataset"),
        ("model.seed=1", "training.seed", "did you mean"),
        ("model.num_query_groups=2", "model.num_key_value_heads", "did you mean"),
        ("model.rope_scaling=linear", "model.rotary_scaling", "did you mean"),
        ("model.sliding_window_size=8", "model.attention_windows", "another section"),
        ("model.attn_scale=8", "model.attention_scale", "did you mean"),
        ("training.completion_only_loss=true", "training.loss_positions", "did you mean"),
        ("training.betas=[0.9, 0.95]", "training.beta2", "did you mean"),
        ("training.min_lr=0", "training.schedule", "training.learning_rate"),
        ("model.num_layer=2", "model.num_layers", "num_heads"),
    ],
)
def test_an_unknown_setting_names_what_exists_and_no_neighbor(key: str, instead: str, not_named: str) -> None:
    _, hint = refuse("train", "tiny", "--set", key)
    assert instead in hint
    assert not_named not in hint


def test_what_synonyms_name_exists_and_what_is_unavailable_does_not() -> None:
    assert {ours for _, ours in SYNONYMS.values()} <= set(setting_paths())
    assert not SYNONYMS.keys() & UNAVAILABLE.keys()
    leaves = {path.rpartition(".")[2] for path in setting_paths()}
    assert not leaves & (SYNONYMS.keys() | UNAVAILABLE.keys())
    assert not set(setting_paths()) & UNAVAILABLE.keys()
    for name, (trainer, ours) in SYNONYMS.items():
        section = ours.partition(".")[0]
        assert hint_for_key(f"{section}.{name}") == f"{trainer}'s {name} is {ours} here"


def test_hints_name_commands_and_options_that_exist() -> None:
    groups = {"lumiere": typer.main.get_command(app)}
    groups |= {f"lumiere {name}": group for name, group in groups["lumiere"].commands.items()}  # pyright: ignore
    options = {option for group in groups.values() for command in [group, *getattr(group, "commands", {}).values()]
               for parameter in command.params for option in parameter.opts}  # fmt: skip
    for path, names in COMMANDS_ELSEWHERE.items():
        assert not names.keys() & groups[path].commands.keys()  # pyright: ignore
    hints = [hint for names in COMMANDS_ELSEWHERE.values() for hint in names.values()]
    for hint in [*hints, *OPTIONS_ELSEWHERE.values(), *UNAVAILABLE.values()]:
        for first, second in re.findall(r"lumiere (\w+) ?([a-z]*)", hint):
            assert first in groups["lumiere"].commands, hint  # pyright: ignore
            assert first not in ("inspect", "runs") or second in groups[f"lumiere {first}"].commands, hint  # pyright: ignore
        assert set(re.findall(r"--[a-z-]+", hint)) <= options, hint
    assert not OPTIONS_ELSEWHERE.keys() & options
    for hint in UNAVAILABLE.values():
        assert set(re.findall(r"\b(?:model|tokenizer|dataset|training)\.\w+", hint)) <= set(setting_paths()), hint


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "ab", 2),
        ("trian", "train", 1),
        ("kitten", "sitting", 3),
        ("patch", "cache", 3),
        ("ca", "abc", 3),
    ],
)
def test_edits(a: str, b: str, distance: int) -> None:
    """The optimal string alignment distance; the numbers are of the literature (kitten, ca) and counted by hand."""
    assert edits(a, b) == edits(b, a) == distance


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("promt", "prompt"),
        ("PROMPT", "prompt"),
        ("hed", "head"),
        ("transformers", None),
        ("huggingface", None),
        ("patch", None),
        ("num_kv_heads", None),
        ("min_learning_rate", None),
    ],
)
def test_nearest_finds_misspellings_and_nothing_else(name: str, found: str | None) -> None:
    assert nearest(name, ["prompt", "head", "transformer-lens", "cache", "num_heads", "learning_rate"]) == found
