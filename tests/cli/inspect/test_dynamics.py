"""`lumiere inspect dynamics`: metrics along the snapshots, compared with `heads`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumiere.cli.inspect.dynamics import ruler
from lumiere.interpret.dynamics import DEFAULT_METRICS
from tests.cli.commands import invoke, refuse
from tests.cli.inspect.commands import printed, shown

STEPS = [0, 1, 2, 4, 8]
PAIRS = ["L0H0>L1H0", "L0H0>L1H1", "L0H1>L1H0", "L0H1>L1H1"]


def values(result: dict[str, Any], metric: str, place: str = "") -> list[float]:
    return result["values"][list(zip(result["metrics"], result["places"], strict=True)).index((metric, place))]


def metrics(*names: str) -> list[str]:
    return [word for name in names for word in ("-m", name)]


def test_the_default_metrics() -> None:
    result, lines = shown("dynamics"), printed("dynamics", "--top-k", "1")
    assert result["steps"] == STEPS
    assert list(dict.fromkeys(result["metrics"])) == list(DEFAULT_METRICS)
    places = zip(result["metrics"], result["places"], strict=True)
    assert [place for metric, place in places if "comp" in metric] == PAIRS
    assert (result["checkpoint"], result["step"], result["curve_steps"][-1]) == ("step-00000008", 8, 12)
    assert result["source"].startswith(
        "5 snapshots, steps 0 to 8; 32 sequences of 7 random tokens of the training split, twice (seed 0); "
    )
    assert "windows of the validation split of stories (seed 0)" in result["source"]
    headings = [line.partition(": ")[0] for line in lines]
    assert [name for name in headings if name in DEFAULT_METRICS] == list(DEFAULT_METRICS)
    assert sum("that changed less" in line for line in lines) == 4
    loss = values(result, "validation-loss")
    assert any(f"{loss[0]:>7.2f} {loss[-1]:>7.2f}" in line for line in lines)


def test_each_snapshot_has_the_numbers_of_heads() -> None:
    names = {"repeat-gap": "repeat_gap", "in-context-score": "in_context_score", "text-repeat-gap": "text_gap"}
    along = shown("dynamics", *metrics("induction", "text-induction", *names))
    for column, step in enumerate(STEPS):
        alone = shown("heads", "--checkpoint", str(step))
        number = alone["score_names"].index("induction")
        for layer, head in np.ndindex(2, 2):
            place = f"L{layer}H{head}"
            assert values(along, "induction", place)[column] == alone["scores"][layer][head][number]
            assert values(along, "text-induction", place)[column] == alone["text_scores"][layer][head][number]
        assert {name: values(along, name)[column] for name in names} == {
            name: alone[key] for name, key in names.items()
        }


def test_a_text_replaces_random_tokens() -> None:
    along = shown("dynamics", "-m", "previous", "--prompt", "aa aa")
    alone = shown("heads", "-c", "4", "--prompt", "aa aa")
    assert along["token_ids"] == alone["token_ids"]
    assert values(along, "previous", "L1H0")[3] == alone["scores"][1][0][0]
    assert set(along["metrics"]) == {"previous"}


def test_metrics_are_unique_and_in_order_and_snapshots_may_be_skipped() -> None:
    result = shown("dynamics", *metrics("norm", "copying", "norm"), "--every", "3")
    assert list(dict.fromkeys(result["metrics"])) == ["norm", "copying"]
    assert len(result["metrics"]) == len(set(zip(result["metrics"], result["places"], strict=True)))
    assert result["steps"] == [0, 4, 8]
    assert shown("dynamics", "-m", "norm", "--every", "99")["steps"] == [0, 8]


def test_the_html_file_is_the_interactive_page() -> None:
    invoke("inspect", "dynamics", "-m", "norm", "--every", "9", "-o", "out.html")
    assert 'addEventListener("keydown"' in Path("out.html").read_text()


@pytest.mark.usefixtures("without_corpus")
def test_without_the_corpus_default_metrics_are_omitted_and_named_ones_refused() -> None:
    result = invoke("inspect", "dynamics", "--json")
    on_text = ["validation-loss", "in-context-score", "text-repeat-gap", "text-induction"]
    assert f"without {', '.join(on_text)}: the corpus" in result.stderr
    assert set(json.loads(result.stdout)["metrics"]) == set(DEFAULT_METRICS) - set(on_text)
    assert "'stories'" in refuse("inspect", "dynamics", "-m", "lens-depth")[0]


def test_the_ruler_is_above_its_columns() -> None:
    steps = [0, 1, 2, 4, 8, 16, 1024, 2048, 4096]
    text = ruler(steps)
    assert text == "0  4  1,024"
    assert all(text[column:].startswith(f"{steps[column]:,}") for column in (0, 3, 6))
