"""`lumiere inspect ablate`: the sequences that it takes, its output, and what it refuses."""

import importlib
from functools import partial

import numpy as np
import pytest

from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.runs import Run
from tests.cli.inspect.commands import inspect, inspect_json

pytestmark = pytest.mark.usefixtures("runs_dir")
inspect_ablate = partial(inspect, "ablate")
shown = partial(inspect_json, "ablate")

OWN_KEYS = {"unit", "mode", "labels", "layers", "indices", "changes", "standard_errors", "order", "loss"}
OWN_KEYS |= {"batch_losses", "batch_changes", "num_targets", "tokens", "first_target", "receipts"}
SMALL = ("--batches", "2", "--batch-size", "3")


def test_windows_of_the_validation_split(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    """Drawn by the seed, none twice, and all of them where so many are not there."""
    windows = tiny_corpus.windows("validation", trained_run.load_config())
    every_row = windows.cut(np.arange(len(windows)))[0].tolist()
    part, same, other = (shown(*SMALL, "--seed", seed) for seed in "112")
    assert len(part["tokens"]) == 6
    assert all(row in every_row for row in part["tokens"])
    assert part["tokens"] == same["tokens"] != other["tokens"]
    assert part["source"] == f"6 of {len(windows)} windows of the validation split of stories (seed 1), in 2 batches"
    everything = shown("--batches", "3", "--batch-size", "1000")
    assert sorted(everything["tokens"]) == sorted(every_row)
    assert len(everything["num_targets"]) == 3
    few = shown("--batches", "1000", "--batch-size", "1000", "--unit", "layer")
    assert len(few["num_targets"]) == len(windows)
    documents = dict(zip(map(tuple, every_row), windows.documents(np.arange(len(windows))).tolist(), strict=True))
    assert part["documents"] == [documents[tuple(row)] for row in part["tokens"]]


def test_json_has_all_that_is_needed_to_repeat_it(trained_run: Run) -> None:
    result = shown(*SMALL)
    assert result.keys() >= OWN_KEYS
    assert "token_ids" not in result
    assert (result["run"], result["unit"], result["mode"]) == (trained_run.name, "head", "mean")
    assert result["labels"] == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert [receipt["holds"] for receipt in result["receipts"]] == [True, True]


def test_random_repeats_score_what_the_repeat_gap_scores() -> None:
    result = shown(*SMALL, "--random", "5", "--seed", "2")
    rows = np.array(result["tokens"])
    assert rows.shape == (6, 11)
    assert (rows[:, 0] == 0).all()
    assert np.array_equal(rows[:, 1:6], rows[:, 6:])
    assert len({tuple(row) for row in result["tokens"]}) == 6
    assert (result["first_target"], result["num_targets"]) == (7, [12, 12])
    assert (
        result["source"] == "6 x 5 random tokens of the training split, twice (seed 2), in 2 batches; "
        "loss of tokens 2 to 5 of the second copy"
    )
    heads = inspect_json("heads", "--random", "5")
    second = heads["losses"][6:]
    gap = np.mean(heads["losses"][1:5]) - np.mean(second)
    assert heads["repeat_gap"] == pytest.approx(gap)
    assert len(second) * 3 == result["num_targets"][0]


def test_few_documents_are_said() -> None:
    """Six windows are of six documents or fewer: an interval of 95 % reaches further than 1.96 errors."""
    result, printed = shown(*SMALL), inspect_ablate(*SMALL).stdout
    count = len(set(result["documents"]))
    reach = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}[count]
    clear = (np.abs(result["changes"]) > reach * np.array(result["standard_errors"])).sum()
    assert f"{clear} of 4 changes exceed {reach:.2f} standard errors (95 %, few documents: {count})" in printed
    assert "1.96 standard errors (95 %, 64 sequences)" in inspect_ablate("--random", "3", "--batches", "2").stdout


def test_one_text(tiny_corpus: TokenizedCorpus) -> None:
    result = shown("--prompt", "Once upon", "--unit", "feedforward")
    ids = [0, *tiny_corpus.tokenizer.encode("Once upon")]
    assert result["tokens"] == [ids]
    assert result["token_ids"] == ids
    assert result["source"] == "prompt"
    assert result["standard_errors"] == [None, None]
    assert result["num_targets"] == [len(ids) - 1]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        (("--layer", "1", "--head", "0"), ["L1H0"]),
        (("--unit", "neuron", "--neuron", "3,0", "--layer", "0"), ["L0N3", "L0N0"]),
        (("--unit", "position", "--pos", "-1", "--layer", "1"), ["L1P15"]),
        (("--unit", "layer"), ["L0", "L1"]),
        (("--unit", "feedforward", "--layer", "1"), ["L1 feed-forward"]),
    ],
)
def test_units_are_chosen(options: tuple[str, ...], labels: list[str]) -> None:
    assert shown(*SMALL, *options)["labels"] == labels


def test_many_ablations_have_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(shown("--batches", "2", "--random", "3")["tokens"]) == 64
    module = importlib.import_module("lumiere.cli.inspect.ablate")  # the package's own name for it is the command
    monkeypatch.setattr(module, "MANY", 3)
    assert len(shown("--batches", "2", "--random", "3")["tokens"]) == 8
    assert len(shown("--batches", "2", "--random", "3", "--layer", "1")["tokens"]) == 64


def test_the_table_is_sorted_and_says_what_it_leaves_out() -> None:
    result, numbers = inspect_ablate(*SMALL, "--top-k", "3"), shown(*SMALL)
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("L")]
    expected = [
        f"{numbers['labels'][n]}  {numbers['changes'][n]:+8.4f} ± {numbers['standard_errors'][n]:.4f}"
        for n in numbers["order"][:3]
    ]
    assert [line.split("  ", 1)[0] for line in lines] == [line.split("  ", 1)[0] for line in expected]
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
    assert "1 more" in result.stderr
    assert f"loss {numbers['loss']:.4f} nats; change without a head (mean), ± standard error:" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith("receipt"))
