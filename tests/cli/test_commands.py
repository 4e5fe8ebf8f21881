"""`train`, `tokenize` and the rest on a trained run: what they print, in words and in JSON."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from lumiere import __version__
from lumiere.config import loader
from lumiere.config.loader import load_config
from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.runs import Run, RunStore
from tests.cli.commands import invoke, read_json, stdout_of


@pytest.fixture
def tiny_yaml(trained_run: Run) -> str:
    """The config of the trained run, as a file."""
    return str(trained_run.config_path)


def test_version_and_help() -> None:
    assert stdout_of("--version") == f"lumiere {__version__}\n"
    assert stdout_of("-h") == stdout_of("--help")


def test_print_config_is_the_resolved_config_in_which_flags_win(tiny_yaml: str) -> None:
    Path("printed.yaml").write_text(stdout_of("train", "small", "--print-config", "--set", "model.num_layers=6"))
    assert load_config("printed.yaml") == load_config("small", ["model.num_layers=6"])
    flags = ("--max-steps", "5", "--set", "training.max_steps=9")
    assert "max_steps: 5\n" in stdout_of("train", tiny_yaml, *flags, "--print-config")
    assert not Path("runs").exists()


def test_train_records_a_run_and_says_how_it_ended(tiny_yaml: str) -> None:
    result = invoke("train", tiny_yaml, "--max-steps", "3", "--seed", "5")
    printed = result.stdout
    assert "training.warmup_steps=4" in result.stderr, "the warm-up never ends"
    run = RunStore().open("latest")
    record, config = run.record, run.load_config()
    assert (record.status, record.step) == ("finished", 3)
    assert (config.training.max_steps, config.training.seed) == (3, 5)
    assert f"{run.name} finished: reached max_steps" in printed
    assert f"best validation loss {record.best_loss:.4f} at step 3" in printed
    assert "Sample:" in printed


@pytest.mark.parametrize("is_active", [True, False])
def test_what_to_try_next_works_as_printed(is_active: bool, tiny_yaml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, no test split, another folder of runs, and an environment that may not be on the PATH."""
    Path("book.txt").write_text("Once upon a time there was a fox.\n" * 40)
    if not is_active:
        monkeypatch.setenv("PATH", os.defpath)
    options = ["model.num_layers=1", "dataset={name: text, data_files: book.txt, sliding_window_size: 0}"]
    sets = [word for option in options for word in ("--set", option)]
    printed = stdout_of("train", tiny_yaml, "--max-steps", "2", "--runs-dir", "else where", *sets)
    commands = list(map(shlex.split, printed.partition("Next steps:\n")[2].splitlines()))
    for program, *arguments in commands:
        assert (program == "lumiere") == is_active
        assert shutil.which(program), program
        invoke(*arguments)
    assert [arguments[1] for arguments in commands] == ["generate", "inspect", "eval"]


def test_train_as_json_and_resume_of_a_finished_run(tiny_yaml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    validate, count = loader.validate, []
    monkeypatch.setattr(loader, "validate", lambda values: count.append(1) or validate(values))
    record = read_json("train", tiny_yaml, "--max-steps", "2")
    assert len(count) == 1, "a config is validated once"
    assert (record["step"], record["status"]) == (2, "finished")
    result = invoke("train", "--resume", record["run"], "--json")
    assert "is finished (reached max_steps)" in result.stderr
    assert json.loads(result.stdout) == record


def test_tokenize_counts_and_takes_the_cache(tiny_yaml: str, tiny_corpus: TokenizedCorpus) -> None:
    summary, printed = read_json("tokenize", tiny_yaml), stdout_of("tokenize", tiny_yaml)
    train, windows = summary["splits"]["train"], tiny_corpus.windows("train", load_config(tiny_yaml))
    assert (summary["from_cache"], summary["fingerprint"]) == (True, tiny_corpus.fingerprint)
    assert (train["documents"], train["tokens"]) == (10, len(tiny_corpus.splits["train"].ids))
    assert 0 < train["padding_share"] == windows.padding_share
    for shown in (f"{windows.padding_share:.1%}", f"{train['tokens']:,}", "(from the cache)"):
        assert shown in printed


def test_tokenize_says_when_the_corpus_is_too_small() -> None:
    Path("book.txt").write_text("one two one two")
    options = ("--set", "dataset={name: text, data_files: book.txt}", "--set", "tokenizer.vocab_size=1000")
    assert re.search(r"vocabulary +\d+ tokens, fewer than the 1,000 asked for", stdout_of("tokenize", "tiny", *options))


def test_tokenize_text_makes_special_characters_visible(tiny_yaml: str, tiny_corpus: TokenizedCorpus) -> None:
    text = "The end.\n\t<|eot|>"
    shown = read_json("tokenize", tiny_yaml, "--text", text)
    assert tiny_corpus.tokenizer.decode(shown["ids"]) == text
    assert "".join(shown["tokens"]) == "The·end.↵⇥<|eot|>"
    assert "<|eot|>" not in shown["tokens"]
    labels, ids = stdout_of("tokenize", tiny_yaml, "--text", text).splitlines()
    assert labels.replace("|", "") == "".join(shown["tokens"]).replace("|", "")
    assert ids == " ".join(map(str, shown["ids"]))
