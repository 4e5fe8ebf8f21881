"""`lumiere inspect diff`: how models are named, what it prints and writes, and what it refuses."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.runs import Run
from tests.cli.inspect.commands import inspect, inspect_json

inspect_diff = partial(inspect, "diff")
shown = partial(inspect_json, "diff")

SMALL = ("--batches", "2", "--batch-size", "3")
KEYS = {"run", "checkpoint", "other", "tokens", "losses", "loss_difference", "kl_ab", "kl_ba", "cka", "matches"}
KEYS |= {"kl_ab_by_position", "match_divergences", "tensors", "relative_changes", "spectral_changes", "not_compared"}


@pytest.fixture
def run(trained_run: Run, other_tokenizer_run: Run) -> Run:
    """A copy of the trained run, with a snapshot, beside one that has another tokenizer."""
    for each in (trained_run, other_tokenizer_run):
        shutil.copytree(each.path, Path("runs") / each.name)
    return Run(Path("runs") / trained_run.name)


def checkpoint_pair(run: Run) -> tuple[str, str]:
    """Two different checkpoints of one run."""
    return f"{run.id}@best", f"{run.id}@previous"


def test_json_has_all_that_is_needed_to_repeat_it(run: Run) -> None:
    result = shown(*checkpoint_pair(run), *SMALL)
    assert result.keys() >= KEYS
    assert (result["run"], result["checkpoint"]) == (run.name, "best")
    assert (result["other"]["run"], result["other"]["checkpoint"]) == (run.name, "previous")
    assert result["weights_sha256"] != result["other"]["weights_sha256"]
    assert len(result["tokens"]) == 6
    assert len(result["kl_ab"]) == len(result["targets"]) == len(result["positions"])
    assert max(result["kl_ab"]) > 0
    assert all(receipt["holds"] for receipt in result["receipts"])
    assert result["losses"][1] - result["losses"][0] == pytest.approx(result["loss_difference"]["difference"])


def test_the_two_are_named_with_and_without_a_checkpoint(run: Run) -> None:
    named = shown(f"{run.id}@latest", f"{run.id}@previous", *SMALL)
    mixed = shown(run.id, f"{run.id}@previous", "--checkpoint", "latest", *SMALL)
    swapped = shown(f"{run.id}@previous", run.name, "-c", "latest", *SMALL)
    assert named == mixed
    step = shown(f"{run.id}@4", run.id, *SMALL)
    assert (step["checkpoint"], step["step"], step["other"]["checkpoint"]) == ("4", 4, "best")
    assert swapped["losses"] == named["losses"][::-1]
    assert swapped["kl_ab"] == named["kl_ba"]
    assert np.array(swapped["cka"]) == pytest.approx(np.array(named["cka"]).T)


def test_a_model_against_itself_is_said_to_be_the_same(run: Run) -> None:
    result = inspect_diff(run.id, run.id, *SMALL)
    assert "the same model: no weight differs" in result.stdout
    assert "weights that changed" not in result.stdout
    numbers = shown(run.id, run.id, *SMALL)
    for name in ("kl_ab", "kl_ba", "match_divergences", "relative_changes", "spectral_changes", "ov_changes"):
        assert set(numbers[name]) == {0}, name
    assert [numbers["cka"][place][place] for place in range(3)] == [1, 1, 1]


def test_what_is_different_stands_first(run: Run) -> None:
    options = (*checkpoint_pair(run), *SMALL, "--top-k", "2")
    result, numbers = inspect_diff(*options), shown(*options)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"A  {run.name}, checkpoint best")
    assert lines[1].startswith(f"B  {run.name}, checkpoint previous")
    first = next(number for number, line in enumerate(lines) if not line) + 1
    a, b = numbers["losses"]
    assert lines[first].endswith(f"A {a:.4f}, B {b:.4f} nats a token")
    kl = sum(numbers["kl_ab"]) / len(numbers["kl_ab"])
    assert any(f"KL(A||B) {kl:.4f}" in line for line in lines[first : first + 4])
    assert all(len(line) <= 80 for line in lines if not line.startswith("receipt"))
    changes = np.array(numbers["losses_b"]) - np.array(numbers["losses_a"])
    largest = changes[np.abs(changes).argmax()]
    table = lines.index(next(line for line in lines if line.startswith("tokens whose loss changed most")))
    assert lines[table + 1].split()[0] == f"{largest:+.2f}"
    tensor = numbers["tensors"][int(np.argmax(numbers["relative_changes"]))]
    assert f"{tensor} ({max(numbers['relative_changes']):.1%})" in result.stdout.replace("\n", " ")


def test_the_picture_names_both(run: Run) -> None:
    result = inspect_diff(*checkpoint_pair(run), *SMALL, "-o", "out.html")
    assert result.exit_code == 0, result.output
    text = Path("out.html").read_text(encoding="utf-8")
    assert f"{run.name}, checkpoint best (step 12) and {run.name}, checkpoint previous" in text


def test_texts_of_ones_own_and_heads_of_any_layer(run: Run, tiny_corpus: TokenizedCorpus) -> None:
    result = shown(*checkpoint_pair(run), "--prompt", "Once upon a time", "--across-layers")
    assert result["tokens"] == [[0, *tiny_corpus.tokenizer.encode("Once upon a time")]]
    assert result["token_ids"] == result["tokens"][0]
    assert result["across_layers"]
    assert result["loss_difference"] is None
    assert not np.isnan(np.array(result["pattern_divergences"], dtype=float)).any()
    within = shown(*checkpoint_pair(run), "--prompt", "Once upon a time")
    assert within["pattern_divergences"][0][2] is None
    printed = inspect_diff(*checkpoint_pair(run), "--prompt", "Once upon a time").stdout
    assert "a difference of" in printed


def test_other_tokenizers_are_compared_by_bytes(
    run: Run, other_tokenizer_run: Run, tiny_corpus: TokenizedCorpus
) -> None:
    """The whole validation split, as `lumiere eval` scores it with each token once."""
    result = shown(run.id, other_tokenizer_run.id)
    evaluated = CliRunner().invoke(
        app, ["eval", run.id, other_tokenizer_run.id, "--stride", "16", "--no-baselines", "--json"]
    )
    both = json.loads(evaluated.stdout)
    assert result["losses"] == pytest.approx([one["bits_per_byte"] for one in both["runs"]], rel=1e-6)
    assert result["loss_unit"] == "bits a byte"
    count = tiny_corpus.splits["validation"].facts.num_documents
    assert result["source"] == f"{count} of {count} documents of the validation split of stories (seed 0)"
    assert "kl_ab" not in result
    assert "the tokenizers differ" in result["not_compared"][0]
    assert "token_embedding.weight" not in result["tensors"]
    printed = inspect_diff(run.id, other_tokenizer_run.id, "--prompt", "Once upon a time").stdout
    assert "not compared: predictions, representations and heads: the tokenizers" in printed
    assert "bits a byte" in printed
    Path("text.txt").write_text("Once upon a time")
    from_file = shown(run.id, other_tokenizer_run.id, "--file", "text.txt", "--verify")
    assert from_file["losses"] == shown(run.id, other_tokenizer_run.id, "--prompt", "Once upon a time")["losses"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("RUN@", "RUN"), "'RUN@'"),
        (("@best", "RUN"), "write RUN or RUN@CHECKPOINT"),
        (("RUN@bets", "RUN"), "did you mean best?"),
        (("RUN", "zzzz"), "zzzz"),
        (("RUN", "RUN", "--prompt", "a", "--val", "1"), "--prompt and --val"),
        (("RUN", "OTHER", "--prompt", "a", "--file", "x.txt"), "--prompt and --file"),
        (("RUN", "OTHER", "--val", "1"), "--val"),
        (("RUN", "OTHER", "--random", "3"), "give a text: --prompt or --file"),
        (("RUN", "OTHER", "--across-layers"), "--across-layers"),
        (("RUN", "OTHER", "--prompt", " "), "empty"),
        (("RUN", "RUN", "-o", "out.txt"), "'out.txt'"),
    ],
)
def test_bad_input_is_refused(run: Run, other_tokenizer_run: Run, options: tuple[str, ...], message: str) -> None:
    names = {"RUN": run.id, "OTHER": other_tokenizer_run.id}

    def named(option: str) -> str:
        reference, at, checkpoint = option.partition("@")
        return names.get(reference, reference) + at + checkpoint

    before = set(Path().rglob("*"))
    result = inspect_diff(*map(named, options))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 2
    assert message.replace("RUN@'", f"{run.id}@'") in result.stderr
    assert set(Path().rglob("*")) == before
