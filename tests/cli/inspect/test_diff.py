"""`lumiere inspect diff`: how models are named, what it prints and writes, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.runs import Run
from tests.cli.commands import read_json, refuse
from tests.cli.inspect.commands import printed, shown, words

SMALL = ("--batches", "2", "--batch-size", "3")


@pytest.fixture
def run(trained_run: Run, other_tokenizer_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the trained run beside a run with another tokenizer."""
    monkeypatch.delenv("LUMIERE_RUNS_DIR")
    for each in (trained_run, other_tokenizer_run):
        shutil.copytree(each.path, Path("runs") / each.name)
    return Run(Path("runs") / trained_run.name)


def checkpoint_pair(run: Run) -> tuple[str, str]:
    return f"{run.id}@best", f"{run.id}@previous"


def test_json_names_both_models(run: Run) -> None:
    result = shown("diff", *checkpoint_pair(run), *SMALL)
    assert (result["run"], result["checkpoint"]) == (run.name, "best")
    assert (result["other"]["run"], result["other"]["checkpoint"]) == (run.name, "previous")
    assert result["weights_sha256"] != result["other"]["weights_sha256"]
    assert len(result["tokens"]) == 6
    assert result["losses"][1] - result["losses"][0] == pytest.approx(result["loss_difference"]["difference"])


def test_models_are_named_with_and_without_a_checkpoint(run: Run) -> None:
    named = shown("diff", f"{run.id}@latest", f"{run.id}@previous", *SMALL)
    mixed = shown("diff", run.id, f"{run.id}@previous", "--checkpoint", "latest", *SMALL)
    swapped = shown("diff", f"{run.id}@previous", run.name, "-c", "latest", *SMALL)
    assert named == mixed
    step = shown("diff", f"{run.id}@4", run.id, *SMALL)
    assert (step["checkpoint"], step["step"], step["other"]["checkpoint"]) == ("4", 4, "best")
    assert swapped["losses"] == named["losses"][::-1]
    assert swapped["kl_ab"] == named["kl_ba"]
    assert np.array(swapped["cka"]) == pytest.approx(np.array(named["cka"]).T)


def test_a_model_is_the_same_as_itself(run: Run) -> None:
    text = words("diff", run.id, run.id, *SMALL)
    assert "the same model: no weight differs" in text
    assert "weights that changed" not in text
    numbers = shown("diff", run.id, run.id, *SMALL)
    for name in ("kl_ab", "kl_ba", "match_divergences", "relative_changes", "spectral_changes", "ov_changes"):
        assert set(numbers[name]) == {0}, name
    assert [numbers["cka"][place][place] for place in range(3)] == [1, 1, 1]


def test_the_differences_come_first(run: Run) -> None:
    options = (*checkpoint_pair(run), *SMALL, "--top-k", "2")
    lines, numbers = printed("diff", *options), shown("diff", *options)
    assert lines[0].startswith(f"A  {run.name}, checkpoint best")
    assert lines[1].startswith(f"B  {run.name}, checkpoint previous")
    first = next(number for number, line in enumerate(lines) if not line) + 1
    a, b = numbers["losses"]
    assert lines[first].endswith(f"A {a:.4f}, B {b:.4f} nats a token")
    kl = sum(numbers["kl_ab"]) / len(numbers["kl_ab"])
    assert any(f"KL(A||B) {kl:.4f}" in line for line in lines[first : first + 4])
    changes = np.array(numbers["losses_b"]) - np.array(numbers["losses_a"])
    largest = changes[np.abs(changes).argmax()]
    table = lines.index(next(line for line in lines if line.startswith("tokens whose loss changed most")))
    assert lines[table + 1].split()[0] == f"{largest:+.2f}"
    tensor = numbers["tensors"][int(np.argmax(numbers["relative_changes"]))]
    assert f"{tensor} ({max(numbers['relative_changes']):.1%})" in " ".join(lines)


def test_a_prompt_and_heads_across_layers(run: Run, tiny_corpus: TokenizedCorpus) -> None:
    result = shown("diff", *checkpoint_pair(run), "--prompt", "Once upon a time", "--across-layers")
    assert result["tokens"] == [[0, *tiny_corpus.tokenizer.encode("Once upon a time")]]
    assert result["token_ids"] == result["tokens"][0]
    assert result["across_layers"]
    assert result["loss_difference"] is None
    assert not np.isnan(np.array(result["pattern_divergences"], dtype=float)).any()
    within = shown("diff", *checkpoint_pair(run), "--prompt", "Once upon a time")
    assert within["pattern_divergences"][0][2] is None
    assert "a difference of" in words("diff", *checkpoint_pair(run), "--prompt", "Once upon a time")


def test_other_tokenizers_are_compared_by_bytes(
    run: Run, other_tokenizer_run: Run, tiny_corpus: TokenizedCorpus
) -> None:
    """Over the whole validation split, as `lumiere eval` scores it with each token once."""
    result = shown("diff", run.id, other_tokenizer_run.id)
    both = read_json("eval", run.id, other_tokenizer_run.id, "--stride", "16", "--no-baselines")
    assert result["losses"] == pytest.approx([one["bits_per_byte"] for one in both["runs"]], rel=1e-6)
    assert result["loss_unit"] == "bits a byte"
    count = tiny_corpus.splits["validation"].facts.num_documents
    assert result["source"] == f"{count} of {count} documents of the validation split of stories (seed 0)"
    assert "kl_ab" not in result
    assert "the tokenizers differ" in result["not_compared"][0]
    assert "token_embedding.weight" not in result["tensors"]
    text = words("diff", run.id, other_tokenizer_run.id, "--prompt", "Once upon a time")
    assert "not compared: predictions, representations and heads: the tokenizers" in text
    assert "bits a byte" in text
    Path("text.txt").write_text("Once upon a time")
    options = (("--file", "text.txt", "--verify"), ("--prompt", "Once upon a time"))
    from_file, from_prompt = (shown("diff", run.id, other_tokenizer_run.id, *option) for option in options)
    assert from_file["losses"] == from_prompt["losses"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("RUN@ RUN", "@'"),
        ("@best RUN", "RUN@CHECKPOINT"),
        ("RUN@bets RUN", "did you mean best?"),
        ("RUN RUN --prompt a --val 1", "--prompt and --val"),
        ("RUN OTHER --val 1", "--val"),
        ("RUN OTHER --random 3", "give a text: --prompt or --file"),
        ("RUN OTHER --across-layers", "--across-layers"),
        ("RUN OTHER --prompt _", "empty"),
    ],
)
def test_bad_input_is_refused(run: Run, other_tokenizer_run: Run, command: str, message: str) -> None:
    names = {"RUN": run.id, "OTHER": other_tokenizer_run.id, "_": " "}
    words = (word.partition("@") for word in command.split())
    before = set(Path().rglob("*"))
    refused = refuse("inspect", "diff", *(names.get(first, first) + at + rest for first, at, rest in words))
    assert message in " ".join(refused)
    assert set(Path().rglob("*")) == before
