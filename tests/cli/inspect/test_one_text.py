"""Analyses of one text: `attention`, `lens`, `logits`, `tokens` and `cache`."""

import json
import shutil
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lumiere.api.inspection import KINDS
from lumiere.cli.inspect.lens import choose_columns
from lumiere.components.hooks import hook_points, run_with_cache
from lumiere.data.dataset import TokenizedCorpus
from lumiere.evaluation.ngrams import BigramModel
from lumiere.persistence.runs import Run
from lumiere.report.figures.heat_maps import stage_name
from tests.cli.commands import invoke, refuse
from tests.cli.inspect.commands import printed, shown, words

PROMPT = ("--prompt", "One day a")
ONE_HEAD = (*PROMPT, "--layer", "1", "--head", "0")


@pytest.fixture(params=["many", "few"])
def colors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A terminal that shows many or few colors."""
    # The package's attribute of that name is the command, not the module.
    for name in ("lumiere.cli.inspect.attention", "lumiere.cli.terminal_plots"):
        monkeypatch.setattr(import_module(name), "color_support", lambda: request.param)
    return request.param


def test_attention_prints_a_line_for_each_head_and_thumbnails(colors: str) -> None:
    lines = printed("attention")
    assert [line.split()[0] for line in lines if line.count("%") == 3] == ["L0H0", "L0H1", "L1H0", "L1H1", "uniform"]
    assert any(line.split() == ["L0H0", "L0H1", "L1H0", "L1H1"] for line in lines)
    assert any(line.startswith("largest share in a cell: ") for line in lines)
    assert len(lines) < 40


def test_attention_draws_the_whole_map_of_one_head(colors: str) -> None:
    lines = printed("attention", *ONE_HEAD)
    assert f"<|sot|> {'██' if colors == 'many' else '███'}" in [line.strip() for line in lines]
    assert not any("L1H1" in line for line in lines)


def test_attention_prints_numbers_into_a_pipe() -> None:
    expected = shown("attention", *ONE_HEAD)
    heading, *rows = [line.split("\t") for line in printed("attention", *ONE_HEAD) if "\t" in line]
    assert heading == ["", *expected["token_labels"]]
    for number, (label, *weights) in enumerate(rows):
        assert label == expected["token_labels"][number]
        assert weights == [f"{weight:.3f}" for weight in expected["patterns"][0][0][number][: number + 1]]
    everything, part = shown("attention"), shown("attention", "--layer", "1", "--head", "1,0")
    assert (part["layers"], part["heads"]) == ([1], [1, 0])
    assert part["patterns"] == [everything["patterns"][1][::-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed("attention", "--kind", kind, *PROMPT)
    assert shown("attention", "--kind", kind, "--verify", *PROMPT)["kind"] == kind
    # No option gives a text of one token, but a window may have one.
    monkeypatch.setattr("lumiere.api.target.DEFAULT_TOKENS", 1)
    printed("attention", "--kind", kind)


def test_one_token_has_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumiere.api.target.DEFAULT_TOKENS", 1)
    assert shown("attention")["mean_distance"] == [[None, None]] * 2


def test_the_lens_prints_every_statistic() -> None:
    numbers = shown("lens", *PROMPT)
    expected = {
        "top": [f"{values[1][0]:.0%}" for values in numbers["top_probabilities"]],
        "probability": [f"{values[1]:.1%}" for values in numbers["target_probabilities"]],
        "rank": [str(values[1]) for values in numbers["target_ranks"]],
        "entropy": [f"{values[1]:.2f}" for values in numbers["entropies"]],
        "kl": [f"{values[1]:.2f}" for values in numbers["divergences"]],
    }
    for stat, cells in expected.items():
        lines = printed("lens", *PROMPT, "--stat", stat)
        row = next(line for line in lines if line.startswith(numbers["token_labels"][1].rjust(12)))
        assert row[13:].split()[:: 2 if stat == "top" else 1] == cells  # in a pipe, a token follows its probability
        first = "embed" if 0 in numbers["decision_stages"] else "L"
        assert any(line.startswith(f"decision depth: {first}") for line in lines)


def test_lens_options(tiny_corpus: TokenizedCorpus) -> None:
    everything = shown("lens", *PROMPT)
    assert everything["stages"] == [f"blocks.{name}" for name in ("0.hook_resid_pre", "0.hook_resid_post")] + [
        "blocks.1.hook_resid_post"
    ]
    assert everything["target_probabilities"][0][-1] is None
    assert len(shown("lens", "--sublayers")["stages"]) == 5
    length = len(everything["token_ids"])
    assert np.shape(shown("lens", *PROMPT, "--top-k", "3")["top_tokens"]) == (3, length, 3)
    (token,) = tiny_corpus.tokenizer.encode("e")
    by_text, by_id = (shown("lens", *PROMPT, "--target", name) for name in ("e", str(token)))
    assert by_text == by_id
    assert set(by_text["targets"]) == {token}
    assert "probability of e" in printed("lens", *PROMPT, "--target", "e", "--stat", "probability")
    part = shown("lens", *PROMPT, "--pos", "-1,0")
    assert part["positions"] == [length - 1, 0]
    assert part["entropies"] == [[row[-1], row[0]] for row in everything["entropies"]]
    # The last token has no next token.
    assert "-" in words("lens", *PROMPT, "--pos", "-1", "--stat", "rank")


def test_many_stages_are_thinned_evenly_and_have_short_names() -> None:
    names = ["embed", *(f"L{layer}" for layer in range(24))]
    columns, width = choose_columns(names, 67)
    assert (columns[0], columns[-1]) == (0, 24)
    assert columns == sorted(set(columns))
    assert width * len(columns) <= 67
    assert choose_columns(names[:3], 67)[0] == [0, 1, 2]
    assert choose_columns(names, 10)[0] == [0, 24]
    stages = ["blocks.0.hook_resid_pre", "blocks.11.hook_resid_mid", "blocks.2.hook_resid_post"]
    assert [stage_name(stage) for stage in stages] == ["embed", "L11 mid", "L2"]


@pytest.mark.usefixtures("uniform_model")
def test_a_uniform_model_ranks_tokens_by_chance() -> None:
    """The places 0 to 319 are shared: their mean is 159.5, and 1 in 320 is 0.3 %."""
    lines = printed("lens", *PROMPT)
    first = next(number for number, line in enumerate(lines) if line.endswith("on top")) + 1
    assert [line.split()[-2:] for line in lines[first : first + 3]] == [["159.5", "0%"]] * 3
    lines = printed("tokens", *PROMPT)
    means = next(line for line in lines if line.lstrip().startswith("mean"))
    assert means.endswith("0% top-1")
    assert "159.5" in lines[lines.index(means) - 1].split()


def last_logits(run: Run, result: dict[str, Any]) -> np.ndarray:
    with torch.no_grad():
        return run.load_model("best").logits(torch.tensor([result["token_ids"]]))[0, -1].double().numpy()


def test_logits_of_a_pair_of_tokens(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    (target,), (versus,) = (tiny_corpus.tokenizer.encode(text) for text in "es")
    result = shown("logits", *PROMPT, "--target", "e", "--vs", str(versus))
    length = len(result["token_ids"])
    found = [result[name] for name in ("positions", "targets", "versus", "reference")]
    assert found == [[length - 1], [target], versus, "token"]
    assert np.shape(result["sources"]) == (1, 2, 2, length)
    assert np.shape(result["neurons"]) == (1, 2, 32)
    total = sum(np.sum(result[name]) for name in ("embed", "pos_embed", "heads", "neurons"))
    logits_V = last_logits(trained_run, result)
    assert total == pytest.approx(logits_V[target] - logits_V[versus], abs=1e-5)
    assert f"the logit of e ({target}) minus that of s ({versus}) is " in words(
        "logits", *PROMPT, "--target", "e", "--vs", "s"
    )


def test_logits_are_centered_over_the_tokens_of_the_training_split(
    trained_run: Run, tiny_corpus: TokenizedCorpus, request: pytest.FixtureRequest
) -> None:
    result = shown("logits", *PROMPT)
    logits_V = last_logits(trained_run, result)
    occurring = np.unique(tiny_corpus.splits["train"].ids)
    assert 0 < len(occurring) < len(logits_V)
    assert (result["reference"], result["positions"]) == ("mean", [len(result["token_ids"]) - 1])
    assert result["logits"][0] == pytest.approx(logits_V.max() - logits_V[occurring].mean(), abs=1e-5)
    assert result["num_averaged"] == len(occurring)
    assert f"{len(occurring)} tokens" in result["averaged_over"]
    assert f"{len(occurring)} tokens" in words("logits", *PROMPT)
    request.getfixturevalue("without_corpus")
    result = shown("logits", *PROMPT)
    text_ids = trained_run.load_tokenizer().text_ids
    assert result["logits"][0] == pytest.approx(logits_V.max() - logits_V[text_ids].mean(), abs=1e-5)
    assert result["num_averaged"] == len(text_ids)
    assert shown("logits", "--prompt", "One", "--raw")["reference"] == "none"


def test_log_probability(trained_run: Run) -> None:
    result = shown("logits", *PROMPT, "--log-prob", "--target", "e")
    log_p_V = torch.from_numpy(last_logits(trained_run, result)).log_softmax(-1).numpy()
    entropy = -float((np.exp(log_p_V) * log_p_V).sum())
    assert (result["reference"], result["averaged_over"]) == ("prediction", None)
    assert result["logits"][0] == pytest.approx(log_p_V[result["targets"][0]] + entropy, abs=1e-5)
    total = sum(np.sum(result[name]) for name in ("embed", "pos_embed", "attention", "feedforward"))
    assert total == pytest.approx(result["logits"][0], abs=1e-5)
    printed("logits", *PROMPT, "--log-prob")


@pytest.mark.parametrize("by", ["layer", "head", "neuron", "source"])
def test_printed_parts_add_up(by: str) -> None:
    logit = shown("logits", *PROMPT)["logits"][0]
    for top_k in ("3", "200"):
        lines = printed("logits", *PROMPT, "--by", by, "--top-k", top_k)
        first = next(number for number, line in enumerate(lines) if line.startswith("at position"))
        body = list(takewhile(bool, lines[lines.index("", first) + 1 :]))
        *added, total = [float(line.rstrip("█░ ").split()[-1]) for line in body]
        assert body[-1].startswith("sum")
        assert total == pytest.approx(logit, abs=6e-4)
        assert sum(added) == pytest.approx(logit, abs=5e-4 * len(added) + 6e-4)
        assert len(added) == 4 if top_k == "3" else len(added) > 4


def test_logits_of_several_positions() -> None:
    lines = printed("logits", *PROMPT, "--pos", "0-1")
    assert [line.split(",")[0] for line in lines if line.startswith("at ")] == ["at position 0", "at position 1"]
    assert sum(line.startswith("sum ") for line in lines) == 2


def test_tokens_are_compared_with_ngrams_of_the_training_split(tiny_corpus: TokenizedCorpus) -> None:
    result = shown("tokens", *PROMPT)
    assert result["baselines"] == "the run's training split"
    split = tiny_corpus.splits["train"]
    bigram = BigramModel.fit(split.ids, split.offsets, 320)
    row = np.array([result["token_ids"]])
    assert result["bigram_losses"] == bigram.losses(row)[0].tolist()
    assert result["unigram_losses"] == bigram.unigram.losses(row)[0].tolist()
    assert len(result["losses"]) == len(result["token_ids"]) - 1


@pytest.mark.usefixtures("without_corpus")
def test_tokens_without_the_corpus_have_no_baselines() -> None:
    result = invoke("inspect", "tokens", *PROMPT, "--json", "-o", "out.csv")
    assert "no baselines: the corpus 'stories'" in result.stderr
    numbers = json.loads(result.stdout)
    assert (numbers["unigram_losses"], numbers["bigram_losses"], numbers["baselines"]) == (None, None, None)
    assert "bigram" not in Path("out.csv").read_text()
    assert "bigram top" not in words("tokens", *PROMPT)


def test_tokens_have_a_line_each() -> None:
    options = ("--prompt", "Once [b]upon")
    numbers, lines = shown("tokens", *options), printed("tokens", *options)
    heading = ["token", "loss", "bits", "entropy", "rank", "unigram", "bigram", "top", "prediction"]
    first = [line.split() for line in lines].index(heading) + 1
    for index, label in enumerate(numbers["token_labels"][1:]):
        loss, bits, entropy, rank, unigram, bigram = (
            numbers[name][index]
            for name in ("losses", "surprisals", "entropies", "ranks", "unigram_losses", "bigram_losses")
        )
        cells = [label, f"{loss:.2f}", f"{bits:.1f}", f"{entropy:.2f}", str(rank), f"{unigram:.2f}", f"{bigram:.2f}"]
        assert lines[first + index].split()[:7] == cells
    mean = lines[first + len(numbers["token_labels"]) - 1].split()
    assert mean[:2] == ["mean", f"{np.mean(numbers['losses']):.2f}"]


def test_cache_lists_all_activations_without_values(trained_run: Run) -> None:
    result = shown("cache", *PROMPT)
    assert sorted(result["names"]) == sorted(hook_points(trained_run.load_model("best")))
    length = len(result["token_ids"])
    assert result["shapes"][result["names"].index("blocks.1.attn.hook_pattern")] == [2, length, length]
    assert not set(result) & {"values", "hook_embed"}
    lines = printed("cache", *PROMPT, "--names", "*.1.attn.hook_pattern", "--names", "hook_embed")
    assert [" ".join(line.split()) for line in lines[3:6]] == [
        f"hook_embed T E {length} x 16 {4 * length * 16} B",
        f"blocks.1.attn.hook_pattern H T S 2 x {length} x {length} {4 * 2 * length**2} B",
        "",
    ]
    assert any("2 activations" in line for line in lines)


def test_cache_saves_the_values_by_name(trained_run: Run) -> None:
    invoke("inspect", "cache", *PROMPT, "--names", "blocks.0.*", "-o", "out.npz")
    with np.load("out.npz") as saved:
        about = json.loads(str(saved["about"]))
        values = {name: saved[name] for name in saved.files if name != "about"}
    with torch.inference_mode():
        _, cache = run_with_cache(trained_run.load_model("best"), torch.tensor([about["token_ids"]]))
    assert list(values) == [name for name in cache if name.startswith("blocks.0.")] == about["names"]
    assert all(np.array_equal(value, cache[name][0].numpy()) for name, value in values.items())


def test_a_lens_is_trained_kept_and_read(trained_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained_run.path, tmp_path / "runs" / trained_run.name)
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(tmp_path / "runs"))
    tuned = shown("lens", "--train", "tuned", "--steps", "10", "--texts", "50")
    assert tuned["lenses"] == ["logit", "bias only", "tuned"]
    assert np.mean(tuned["divergences"][2]) < np.mean(tuned["divergences"][0])
    both = shown("lens", "--train", "jacobian", "--texts", "2")
    assert both["lenses"] == ["logit", "tuned", "jacobian"]
    assert both["divergences"][1] == tuned["divergences"][2]
    assert "KL(final || lens)" in words("lens", "--compare", "-o", "lenses.svg")
    plain, read = shown("lens", "--prompt", "One day"), shown("lens", "--prompt", "One day", "--lens", "tuned")
    assert read["entropies"][-1] == plain["entropies"][-1]
    assert read["entropies"][0] != plain["entropies"][0]
    assert "step" in refuse("inspect", "lens", "--lens", "tuned", "--checkpoint", "previous")[0]
    invoke("inspect", "lens", "--prompt", "One day", "--lens", "jacobian", "-o", "lens.svg")
    Path("text.txt").write_text("One day a fox met a bear. " * 60)
    assert "text.txt" in shown("lens", "--train", "tuned", "--steps", "1", "--file", "text.txt")["source"]


def test_interchange_reads_pairs_and_refuses_what_is_none() -> None:
    pairs = [{"base": f"One {a}", "source": f"One {b}", "label": b} for a in "abc" for b in "abc"]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = ("interchange", "--pairs", "pairs.jsonl", "--steps", "2", "--seeds", "2")
    found = shown(*options, "--verify", "-o", "out.svg")
    assert np.shape(found["accuracies"]) == (7, 2)
    assert (found["num_fitted"], found["num_tested"], len(found["answers"])) == (4, 5, 3)
    assert "difference of means" in words(*options)
    for line, named in {
        "{": "JSON",
        "[]": "no pair",
        '{"base": "a", "source": "b", "labl": "c"}': "did you mean label",
        '{"base": "a", "source": "b"}': "label",
        '{"base": "a", "source": "b", "label": "zqx"}': "3 tokens",
        '{"base": "a", "source": "b b b", "label": "a"}': "one length",
    }.items():
        Path("bad.jsonl").write_text(line + "\n")
        assert named in " ".join(refuse("inspect", "interchange", "--pairs", "bad.jsonl"))
    Path("few.jsonl").write_text(json.dumps(pairs[0]) + "\n")
    assert "1 pairs" in refuse("inspect", "interchange", "--pairs", "few.jsonl")[0]
    assert "--rank 99" in refuse("inspect", *options, "--rank", "99")[0]


@pytest.mark.parametrize("by", ["position", "unit"])
def test_the_columns_of_a_map_of_patches_stand_under_their_names(by: str) -> None:
    pair = ("--prompt=One day a fox", "--corrupt=One day a dog", "--target=b", "--vs=c")
    site = "resid_pre" if by == "position" else "z"
    lines = invoke("inspect", "patch", *pair, "--site", site, "--by", by).stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.split()[:2] in (["L0", "L1"], ["H0", "H1"]))
    rows = list(takewhile(str.strip, lines[first + 1 :]))
    assert rows
    assert {len(row) for row in rows} == {len(lines[first])}
