"""The commands on a trained run: what they print, in words and in JSON."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lumiere import __version__
from lumiere.cli import app
from lumiere.config.loader import load_config
from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.runs import Run, RunStore
from tests.checkpoints import remove_pointers


def run_command(*arguments: str) -> str:
    """The stdout of a command that must succeed."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def runs_dir(trained_run: Run, tmp_path: Path) -> str:
    """With a copy of the trained run, since `eval` keeps what it has found with the run."""
    shutil.copytree(trained_run.path.parent, tmp_path / "trained")
    return str(tmp_path / "trained")


def test_version_and_help() -> None:
    assert run_command("--version") == f"lumiere {__version__}\n"
    assert run_command("-h") == run_command("--help")


def test_print_config_is_the_resolved_config() -> None:
    Path("printed.yaml").write_text(run_command("train", "small", "--print-config", "--set", "model.num_layers=6"))
    assert load_config("printed.yaml") == load_config("small", ["model.num_layers=6"])
    assert not Path("runs").exists()


def test_flags_win_over_set(tiny_yaml: Path) -> None:
    flags = ("--max-steps", "5", "--set", "training.max_steps=9")
    assert "max_steps: 5\n" in run_command("train", str(tiny_yaml), *flags, "--print-config")


@pytest.fixture
def tiny_yaml(trained_run: Run) -> Path:
    """The config of the trained run, as a file."""
    return trained_run.config_path


def test_train_records_a_run_and_says_how_it_ended(tiny_yaml: Path) -> None:
    printed = run_command("train", str(tiny_yaml), "--max-steps", "3", "--seed", "5")
    run = RunStore().open("latest")
    record = run.record
    assert record.status == "finished"
    assert record.step == 3
    assert f"{run.name} finished: reached max_steps" in printed
    assert f"best validation loss {record.best_loss:.4f} at step 3" in printed
    assert "Sample:" in printed
    for command in ("generate --run", "inspect attention --layer 1 --run", "eval"):
        assert f"lumiere {command} {run.id}" in printed
    config = run.load_config()
    assert (config.training.max_steps, config.training.seed) == (3, 5)


@pytest.mark.parametrize("is_active", [True, False])
def test_what_to_try_next_works_as_printed(is_active: bool, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, no test split, another folder of runs, and an environment that may not be on the PATH."""
    Path("book.txt").write_text("Once upon a time there was a fox.\n" * 40)
    if not is_active:
        monkeypatch.setenv("PATH", os.defpath)
    options = ["model.num_layers=1", "dataset={name: text, data_files: book.txt, sliding_window_size: 0}"]
    sets = [word for option in options for word in ("--set", option)]
    printed = run_command("train", str(tiny_yaml), "--max-steps", "2", "--runs-dir", "else where", *sets)
    commands = printed.partition("Next steps:\n")[2].splitlines()
    assert len(commands) == 3
    for command in commands:
        program, *arguments = shlex.split(command)
        assert (program == "lumiere") == is_active
        assert shutil.which(program), program
        run_command(*arguments)


def test_train_warns_of_a_warm_up_that_never_ends(tiny_yaml: Path) -> None:
    for steps, is_said in (("3", True), ("4", False)):
        result = CliRunner().invoke(app, ["train", str(tiny_yaml), "--max-steps", steps, "--json"])
        assert result.exit_code == 0
        assert ("training.warmup_steps=4" in result.stderr) == is_said


def test_train_as_json_and_resume_of_a_finished_run(tiny_yaml: Path) -> None:
    record = json.loads(run_command("train", str(tiny_yaml), "--max-steps", "2", "--json"))
    assert (record["step"], record["status"]) == (2, "finished")
    result = CliRunner().invoke(app, ["train", "--resume", record["run"]])
    assert result.exit_code == 0
    assert "is finished (" in result.stderr
    assert RunStore().open("latest").record.step == 2


def test_tokenize_counts_and_takes_the_cache(tiny_yaml: Path, tiny_corpus: TokenizedCorpus) -> None:
    summary = json.loads(run_command("tokenize", str(tiny_yaml), "--json"))
    assert summary["from_cache"] is True
    assert summary["fingerprint"] == tiny_corpus.fingerprint
    train = summary["splits"]["train"]
    assert train["documents"] == 10
    assert train["tokens"] == len(tiny_corpus.splits["train"].ids)
    padding = tiny_corpus.windows("train", load_config(str(tiny_yaml))).padding_share
    assert 0 < train["padding_share"] == padding
    printed = run_command("tokenize", str(tiny_yaml))
    assert f"{padding:.1%}" in printed
    assert f"{train['tokens']:,}" in printed
    assert "(from the cache)" in printed


def test_tokenize_says_when_the_corpus_is_too_small() -> None:
    Path("book.txt").write_text("one two one two")
    options = ("--set", "dataset={name: text, data_files: book.txt}", "--set", "tokenizer.vocab_size=1000")
    printed = run_command("tokenize", "tiny", *options)
    assert re.search(r"vocabulary +\d+ tokens, fewer than the 1,000 asked for", printed)


def test_tokenize_text_makes_special_characters_visible(tiny_yaml: Path, tiny_corpus: TokenizedCorpus) -> None:
    text = "The end.\n\t<|eot|>"
    shown = json.loads(run_command("tokenize", str(tiny_yaml), "--text", text, "--json"))
    assert tiny_corpus.tokenizer.decode(shown["ids"]) == text
    assert "".join(shown["tokens"]) == "The·end.↵⇥<|eot|>"
    assert "<|eot|>" not in shown["tokens"]
    labels, ids = run_command("tokenize", str(tiny_yaml), "--text", text).splitlines()
    assert labels.replace("|", "") == "".join(shown["tokens"]).replace("|", "")
    assert ids == " ".join(map(str, shown["ids"]))


def test_eval_prints_every_average(runs_dir: str, trained_run: Run) -> None:
    scores = json.loads(run_command("eval", trained_run.id, "--runs-dir", runs_dir, "--json"))
    assert scores["run"] == trained_run.name
    assert scores["checkpoint"] == "best"
    assert scores["loss"] == pytest.approx(trained_run.record.best_loss, abs=1e-6)
    printed = run_command("eval", trained_run.id, "--runs-dir", runs_dir)
    for name in ("loss", "perplexity", "mean_batch_loss"):
        form = ",.2f" if name == "perplexity" else ".4f"
        assert format(scores[name], form) in printed
    assert f"{scores['num_tokens']:,} tokens in {scores['num_windows']:,} windows" in printed


def test_eval_of_a_text_and_of_another_split(runs_dir: str) -> None:
    Path("text.txt").write_text("Once upon a time there was a fox.", encoding="utf-8")
    text = json.loads(run_command("eval", "latest", "--runs-dir", runs_dir, "--text", "text.txt", "--json"))
    assert (text["corpus"], text["documents"]) == ("text.txt", 1)
    test = json.loads(run_command("eval", "latest", "--runs-dir", runs_dir, "--split", "test", "--json"))
    assert test["corpus"] == "stories test"


def test_generate_continues_the_prompt_and_repeats_by_seed(runs_dir: str) -> None:
    options = ("--runs-dir", runs_dir, "--prompt", "Once upon", "-n", "30", "--seed", "3")
    first = run_command("generate", *options)
    assert first.startswith("Once upon")
    assert first == run_command("generate", *options)
    assert first != run_command("generate", *options[:-1], "4")
    greedy = [run_command("generate", *options[:-1], seed, "--temperature", "0") for seed in ("1", "2")]
    assert greedy[0] == greedy[1]


def test_inspect_attention_draws_each_head(runs_dir: str) -> None:
    printed = run_command("inspect", "attention", "--layer", "1", "--runs-dir", runs_dir)
    assert "L1H0" in printed
    assert "L1H1" in printed
    assert "<|sot|>" in printed
    assert max(len(line) for line in printed.splitlines() if "\t" not in line) <= 80  # a table is for scripts
    one = run_command("inspect", "attention", "--layer", "1", "--head", "1", "--runs-dir", runs_dir)
    assert "L1H0" not in one


def test_inspect_attention_as_json(runs_dir: str, tiny_corpus: TokenizedCorpus) -> None:
    options = ("inspect", "attention", "--layer", "0", "--prompt", "Once upon", "--runs-dir", runs_dir, "--json")
    shown: dict[str, Any] = json.loads(run_command(*options))
    assert shown["token_ids"] == [0, *tiny_corpus.tokenizer.encode("Once upon")]
    (heads,) = shown["patterns"]
    assert len(heads) == 2
    for pattern in heads:
        for row, weights in enumerate(pattern):
            assert sum(weights) == pytest.approx(1, abs=1e-6)
            assert not any(weights[row + 1 :])


def test_inspect_without_a_prompt_always_takes_the_same_window(runs_dir: str, tiny_corpus: TokenizedCorpus) -> None:
    shown = json.loads(run_command("inspect", "attention", "--runs-dir", runs_dir, "--json"))
    assert shown["token_ids"] == tiny_corpus.splits["validation"].ids[:16].tolist()


def test_runs_ls_and_show(runs_dir: str, trained_run: Run) -> None:
    (listed,) = json.loads(run_command("runs", "ls", "--runs-dir", runs_dir, "--json"))
    assert (listed["id"], listed["status"]) == (trained_run.id, "finished")
    printed = run_command("runs", "ls", "--runs-dir", runs_dir)
    assert trained_run.id in printed
    assert f"{listed['best_loss']:.4f}" in printed
    shown = run_command("runs", "show", trained_run.id[:4], "--runs-dir", runs_dir)
    assert "model.context_size" in shown


def test_runs_ls_of_nothing_and_of_damaged_records(trained_run: Run) -> None:
    assert run_command("runs", "ls", "--json") == "[]\n"
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    (Path("runs") / trained_run.name / "run.json").write_text('{"status": "runn')
    assert "unknown" in run_command("runs", "ls")
    assert "unknown" in run_command("runs", "show", "latest")


def test_latest_is_taken_and_named_where_there_is_no_best(trained_run: Run) -> None:
    copy = Path("runs") / trained_run.name
    shutil.copytree(trained_run.path, copy)
    remove_pointers(Run(copy), "best")
    result = CliRunner().invoke(app, ["eval", "latest", "--json"])
    assert json.loads(result.stdout)["checkpoint"] == "latest"
    assert f"run {trained_run.id} has no checkpoint best yet, latest is taken" in result.stderr
