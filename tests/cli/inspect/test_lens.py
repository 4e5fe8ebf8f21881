"""`lumiere inspect lens`: what it shows, writes and refuses."""

from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from lumiere.cli.inspect.lens import choose_columns
from lumiere.data.dataset import TokenizedCorpus
from lumiere.report.figures.heat_maps import stage_name
from tests.cli.inspect.commands import inspect, inspect_json

PROMPT = ("--prompt", "One day a")
OWN_KEYS = {
    *("tokens", "positions", "stages", "top_tokens", "top_probabilities", "targets", "target_probabilities"),
    *("target_ranks", "target_ties", "entropies", "divergences", "decision_stages", "receipts"),
}


def inspect_lens(runs_dir: str, *options: str) -> Result:
    return inspect("lens", "--runs-dir", runs_dir, *options)


def shown(runs_dir: str, *options: str) -> dict[str, Any]:
    return inspect_json("lens", "--runs-dir", runs_dir, *options)


def test_json(runs_dir: str, tiny_corpus: TokenizedCorpus) -> None:
    result = shown(runs_dir, *PROMPT, "--top-k", "3")
    assert result.keys() > OWN_KEYS
    assert result["token_ids"] == [0, *tiny_corpus.tokenizer.encode("One day a")]
    assert result["stages"] == [f"blocks.{name}" for name in ("0.hook_resid_pre", "0.hook_resid_post")] + [
        "blocks.1.hook_resid_post"
    ]
    assert np.shape(result["top_tokens"]) == (3, len(result["token_ids"]), 3)
    assert result["target_probabilities"][0][-1] is None
    assert [receipt["holds"] for receipt in result["receipts"]] == [True] * 3


def test_the_default_text_and_all_stages(runs_dir: str) -> None:
    result = shown(runs_dir, "--sublayers")
    assert len(result["stages"]) == 5
    assert result["source"] == "start of the validation split of stories"


@pytest.mark.usefixtures("uniform_model")
def test_a_uniform_model_is_on_top_by_chance(runs_dir: str) -> None:
    lines = inspect_lens(runs_dir, *PROMPT).stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.endswith("on top")) + 1
    for line in lines[first : first + 3]:
        assert line.split()[-2:] == ["159.5", "0%"]


@pytest.mark.parametrize("stat", ["top", "probability", "rank", "entropy", "kl"])
def test_every_statistic_is_drawn(runs_dir: str, stat: str) -> None:
    numbers = shown(runs_dir, *PROMPT)
    text = inspect_lens(runs_dir, *PROMPT, "--stat", stat).stdout
    assert max(map(len, text.splitlines())) <= 80 or "receipt" in max(text.splitlines(), key=len)
    label = numbers["token_labels"][1]
    row = next(line for line in text.splitlines() if line.startswith(label.rjust(12)))
    cells = row[13:].split()
    expected = {
        "probability": [f"{values[1]:.1%}" for values in numbers["target_probabilities"]],
        "rank": [str(values[1]) for values in numbers["target_ranks"]],
        "entropy": [f"{values[1]:.2f}" for values in numbers["entropies"]],
        "kl": [f"{values[1]:.2f}" for values in numbers["divergences"]],
    }
    if stat == "top":  # in a pipe a token stands behind its probability
        assert cells[::2] == [f"{values[1][0]:.0%}" for values in numbers["top_probabilities"]]
    else:
        assert cells == expected[stat]
    assert f"decision depth: {'embed' if 0 in numbers['decision_stages'] else 'L'}" in text


def test_the_next_token_is_told_from_a_chosen_one(runs_dir: str, tiny_corpus: TokenizedCorpus) -> None:
    token = tiny_corpus.tokenizer.encode("e")[0]
    by_text, by_id = (shown(runs_dir, *PROMPT, "--target", name) for name in ("e", str(token)))
    assert by_text == by_id
    assert set(by_text["targets"]) == {token}
    assert "probability of e\n" in inspect_lens(runs_dir, *PROMPT, "--target", "e", "--stat", "probability").stdout


def test_positions_are_chosen(runs_dir: str) -> None:
    everything, part = shown(runs_dir, *PROMPT), shown(runs_dir, *PROMPT, "--pos", "-1,0")
    assert part["positions"] == [len(everything["token_ids"]) - 1, 0]
    assert part["entropies"] == [[row[-1], row[0]] for row in everything["entropies"]]
    # Nothing follows the last token: there is nothing to be asked for.
    alone = inspect_lens(runs_dir, *PROMPT, "--pos", "-1", "--stat", "rank")
    assert alone.exit_code == 0
    assert "-" in alone.stdout


def test_many_stages_are_thinned_out_evenly() -> None:
    names = ["embed", *(f"L{layer}" for layer in range(24))]
    columns, width = choose_columns(names, 67)
    assert (columns[0], columns[-1]) == (0, 24)
    assert columns == sorted(set(columns))
    assert width * len(columns) <= 67
    assert choose_columns(names[:3], 67)[0] == [0, 1, 2]
    assert choose_columns(names, 10)[0] == [0, 24]


def test_stages_have_short_names() -> None:
    assert stage_name("blocks.0.hook_resid_pre") == "embed"
    assert stage_name("blocks.11.hook_resid_mid") == "L11 mid"
    assert stage_name("blocks.2.hook_resid_post") == "L2"
