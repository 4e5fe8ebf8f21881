"""Whatever the user gets wrong: two lines on stderr, exit code 2, and nothing made."""

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.files import locked
from lumiere.persistence.runs import Run
from lumiere.training import loggers
from tests.checkpoints import folder_of


def refuse(arguments: list[str]) -> tuple[str, str]:
    """Run a command that must be refused; its error and its hint."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert result.stderr.replace("\n", "").isprintable(), "nothing that a user typed steers the terminal"
    return lines[0], lines[1]


@pytest.fixture
def corpora() -> None:
    """Corpora in the current folder, each with one thing wrong."""
    Path("empty.txt").write_text("\n  \n")
    Path("book.txt").write_text("A short book.\n")
    Dataset.from_dict({"body": ["some text"]}).to_parquet("no-text-column.parquet")
    Dataset.from_dict({"text": [1, 2]}).to_parquet("numbers.parquet")


TRAINING = [
    ("model.num_head=4", "unknown key model.num_head"),
    ("model.n_embd=4", "unknown key model.n_embd"),
    ("model.num_heads=four", "model.num_heads must be a whole number"),
    ("model.num_heads=0", "model.num_heads must be at least 1"),
    ("model.dropout=1.5", "model.dropout must be less than 1"),
    ("training.learning_rate=nan", "training.learning_rate must be a number"),
    ("model.num_layers=yes", "model.num_layers must be a whole number"),
    ("dataset.sliding_window_size=64", "dataset.sliding_window_size must be smaller than model.context_size"),
    ("dataset.name=./no-such-folder", "there is no dataset folder './no-such-folder'"),
    ("dataset.name=nobody/nothing", "dataset 'nobody/nothing' is not on this machine"),
    ("dataset={name: text, data_files: none.txt}", "there is no file 'none.txt'"),
    ("dataset={name: text}", "dataset 'text' needs dataset.data_files"),
    ("dataset={name: text, data_files: empty.txt}", "holds no text"),
    ("dataset={name: text, data_files: {test: book.txt}}", "has no split 'train'"),
    ("dataset={name: parquet, data_files: no-text-column.parquet}", "has no column 'text', it has body"),
    (
        "dataset={name: parquet, data_files: numbers.parquet}",
        "the column 'text' of dataset 'parquet' holds int64, not text",
    ),
    ("training.loggers=tensorbord", "training.loggers must be 'tensorboard' or 'wandb', got 'tensorbord'"),
    ("training.loggers={}", "training.loggers must be a list, got a dict"),
    ("training.device=gpu", "training.device must be auto, cpu"),
    ("no-equals-sign", "is not key=value"),
]


@pytest.mark.usefixtures("corpora")
@pytest.mark.parametrize(("override", "message"), TRAINING)
def test_train_refuses(override: str, message: str) -> None:
    error, _ = refuse(["train", "tiny", "--set", override])
    assert message in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("override", "guess"),
    [
        ("training.loggers=tensorbord", "tensorboard"),
        ("training.loggers=[wandb, wadb]", "wandb"),
        ("training.optimizer=adam", "adamw"),
    ],
)
def test_a_choice_that_is_misspelt_gets_the_nearest(override: str, guess: str) -> None:
    assert refuse(["train", "tiny", "--set", override])[1] == f"hint: did you mean {guess}?"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_train_refuses_a_logger_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_is_installed(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(loggers, "distribution", nothing_is_installed)
    error, hint = refuse(["train", "tiny", "--set", f"training.loggers={name}"])
    assert error == f"error: training.loggers={name} needs the package {name}, which is not installed"
    assert hint == f"hint: pip install {name}"
    assert not Path("runs").exists()


def test_train_refuses_a_device_that_is_not_there() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    error, hint = refuse(["train", "tiny", "--device", missing])
    assert error == f"error: there is no device '{missing}'"
    assert "cpu" in hint
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.yaml", lambda path: None, "no config 'none.yaml'"),
        ("empty.yaml", lambda path: path.write_text(""), "is empty"),
        ("list.yaml", lambda path: path.write_text("- a\n"), "holds a list"),
        ("latin.yaml", lambda path: path.write_bytes(b"model: \xe9"), "is not UTF-8"),
        ("folder.yaml", lambda path: path.mkdir(), "is a folder"),
    ],
)
def test_train_refuses_a_config(name: str, write: Callable[[Path], None], message: str) -> None:
    write(Path(name))
    error, _ = refuse(["train", name])
    assert message in error
    assert not Path("runs").exists()


def test_train_refuses_a_subset_that_is_not_there() -> None:
    folder = Path("corpus")
    Dataset.from_dict({"text": ["some text"]}).to_parquet(folder / "one" / "train.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*.parquet\n"
        "- config_name: two\n  data_files: one/*.parquet\n---\n"
    )
    error, hint = refuse(["train", "tiny", "--set", "dataset.name=corpus", "--set", "dataset.subset=ome"])
    assert error == "error: dataset 'corpus' has no subset 'ome', it has one, two"
    assert hint == "hint: --set dataset.subset=one"
    error, hint = refuse(["train", "tiny", "--set", "dataset.name=./corpus"])
    assert "has several subsets" in error


def test_train_needs_a_config_or_a_run() -> None:
    assert "no config given" in refuse(["train"])[0]
    assert "keeps its own config" in refuse(["train", "tiny", "--resume", "latest"])[0]
    assert "keeps its own config" in refuse(["train", "--resume", "latest", "--print-config"])[0]


def test_train_plans_a_new_training_or_nothing() -> None:
    error, hint = refuse(["train", "--plan", "--resume", "latest"])
    assert "--plan and --resume" in error
    assert "lumiere runs show latest" in hint
    assert "--plan and --resume" in refuse(["train", "tiny", "--plan", "--resume", "latest", "--print-config"])[0]
    assert "--plan and --print-config" in refuse(["train", "tiny", "--plan", "--print-config"])[0]
    assert "no config given" in refuse(["train", "--plan"])[0]
    assert "unknown key model.n_embd" in refuse(["train", "tiny", "--plan", "--set", "model.n_embd=4"])[0]
    assert not Path("runs").exists()


@pytest.mark.parametrize("reference", ["nothere1", "../../etc", "/etc/passwd", "", "a b", "\x1b[31mred", "latest"])
@pytest.mark.parametrize(
    "command",
    [
        ["eval"],
        ["generate", "--run"],
        ["inspect", "attention", "--run"],
        ["train", "--resume"],
        ["runs", "show"],
        ["runs", "card"],
        ["runs", "compare"],
        ["runs", "plot"],
        ["runs", "watch"],
        ["runs", "rm", "--yes"],
        ["runs", "prune", "--yes"],
    ],
)
def test_no_such_run(command: list[str], reference: str) -> None:
    error, _ = refuse([*command, reference])
    assert "no run" in error


@pytest.fixture
def runs(trained_run: Run) -> Path:
    """A copy of the trained run that may be damaged, alone in the runs directory."""
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    return Path("runs")


def test_ambiguous_run(trained_run: Run, runs: Path) -> None:
    twin = trained_run.name.replace(trained_run.id, trained_run.id[:7] + ("x" if trained_run.id[7] != "x" else "y"))
    shutil.copytree(trained_run.path, runs / twin)
    error, hint = refuse(["eval", trained_run.id[:7]])
    assert "2 runs" in error
    assert trained_run.id in error + hint
    assert CliRunner().invoke(app, ["runs", "show", trained_run.id]).exit_code == 0


@pytest.mark.parametrize("name", ["bset", "../best", "step-00000003", "999", ""])
def test_no_such_checkpoint(trained_run: Run, runs: Path, name: str) -> None:
    error, hint = refuse(["eval", "latest", "--checkpoint", name])
    assert f"run {trained_run.id} has no checkpoint '{name}'" in error
    assert "it has best, latest" in hint


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:7],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: b"this is no checkpoint",
    ],
)
def test_damaged_checkpoint(trained_run: Run, runs: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder_of(Run(runs / trained_run.name), "best") / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for command in (["eval", "latest"], ["generate"], ["inspect", "attention"]):
        assert "is damaged" in refuse(command)[0]


def test_empty_prompt(runs: Path) -> None:
    for prompt in ("", " ", "\n"):
        assert "the prompt is empty" in refuse(["generate", "--prompt", prompt])[0]
        assert "the prompt is empty" in refuse(["inspect", "attention", "--prompt", prompt])[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "latest", "--split", "tset"], "the corpus has no split 'tset'"),
        (["eval", "latest", "--text", "none.txt"], "none.txt cannot be read"),
        (["eval", "latest", "--text", "runs"], "runs cannot be read"),
        (["eval", "latest", "--text", "none.txt", "--dataset", "stories"], "--text and --dataset"),
        (["eval", "latest", "--subset", "raw"], "--subset"),
        (["eval", "latest", "--text", "none.txt", "--split", "test"], "--split"),
        (["eval", "latest", "--dataset", "text"], "'text' reads files"),
        (["eval", "latest", "--dataset", "./no-such-folder"], "there is no dataset folder './no-such-folder'"),
        (["eval", "latest", "--dataset", "stories", "--split", "tset"], "the corpus has no split 'tset'"),
        (["eval", "latest", "--stride", "0"], "1 to 16 for windows of 16 tokens, got 0"),
        (["eval", "latest", "--stride", "17"], "1 to 16 for windows of 16 tokens, got 17"),
        (["eval", "latest", "-o", "eval.gif"], "'eval.gif'"),
        (["eval", "latest", "-o", "none/eval.png"], "'none'"),
        (["eval", "latest", "--device", "tpu"], "there is no device 'tpu'"),
        (["generate", "--temperature", "-1"], "the temperature must be 0 or more"),
        (["generate", "--temperature", "nan"], "the temperature must be 0 or more"),
        (["generate", "--top-k", "0"], "top-k must be at least 1"),
        (["generate", "--top-p", "1.5"], "top-p must be more than 0 and at most 1"),
        (["inspect", "attention", "--layer", "2"], "there is no layer 2"),
        (["inspect", "attention", "--layer", "-3"], "there is no layer -3"),
        (["inspect", "attention", "--head", "7"], "there is no head 7"),
        (["inspect", "attention", "--prompt", "word " * 40], "the model sees 16"),
    ],
)
def test_refused_options(runs: Path, arguments: list[str], message: str) -> None:
    assert message in refuse(arguments)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "--status", "finish"], "there is no status 'finish'"),
        (["ls", "--status", "\x1b"], "there is no status '\\x1b'"),
        (["ls", "--sort", "los"], "there is no order 'los'"),
        (["ls", "-n", "0"], "the limit must be at least 1, not 0"),
        (["ls", "--tag", "a b"], "'a b' is not a tag"),
        (["tag", "latest", "good", "b/c"], "'b/c' is not a tag"),
        (["tag", "latest", "x", "--remove"], "has no tag 'x'"),
        (["tag", "nothere1", "x"], "no run 'nothere1'"),
        (["note", "nothere1", "x"], "no run 'nothere1'"),
        (["note", "latest", "\udc80"], "the note is not valid text"),
        (["compare", "latest"], "a comparison needs two runs or more"),
        (["compare", "latest", "latest"], "a comparison needs two runs or more"),
        (["plot", "latest", "--x", "tokns"], "'tokns'"),
        (["plot", "latest", "-o", "loss.gif"], "'loss.gif'"),
        (["plot", "latest", "-o", "none/loss.png"], "'none'"),
        (["plot", "latest", "-o", "loss.png", "--json"], "--json and --output"),
        (["rm", "latest"], "stdin is not a terminal"),
        (["rm", "latest", "nothere1", "--yes"], "no run 'nothere1'"),
        (["prune"], "stdin is not a terminal"),
        (["prune", "--keep", "bset", "--yes"], "there is no checkpoint 'bset' to keep"),
        (["prune", "--keep", "", "--yes"], "there is no checkpoint '' to keep"),
    ],
)
def test_runs_refuses(runs: Path, arguments: list[str], message: str) -> None:
    before = sorted(runs.rglob("*"))
    assert message in refuse(["runs", *arguments])[0]
    assert sorted(runs.rglob("*")) == before
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]


def test_a_running_run_is_not_removed(trained_run: Run, runs: Path) -> None:
    run = Run(runs / trained_run.name)
    run.update(status="running")
    with locked(run.path):
        assert f"run {run.id} is running" in refuse(["runs", "rm", run.id, "--yes"])[0]
    assert run.record_path.exists()


def test_a_run_without_losses_is_not_drawn(trained_run: Run, runs: Path) -> None:
    (runs / trained_run.name / "metrics.jsonl").unlink()
    assert f"run {trained_run.id} has no losses yet" in refuse(["runs", "plot", "latest", "-o", "loss.png"])[0]
    assert not Path("loss.png").exists()


def test_text_that_is_empty_or_not_utf8(runs: Path) -> None:
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes(b"one\r\ncaf\xe9")
    assert "the text is empty" in refuse(["eval", "latest", "--text", "empty.txt"])[0]
    for arguments in (["eval", "latest", "--text"], ["inspect", "tokens", "--file"], ["generate", "--prompts"]):
        message, hint = refuse([*arguments, "latin.txt"])
        assert "latin.txt, line 2" in message
        assert "iconv" in hint
    surrogate = refuse(["generate", "--prompt", "\udc80"])[0]
    assert "surrogate" in surrogate


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("there.md", "there.md exists"),
        ("runs", "'runs' is a folder"),
        ("", "'' is no file"),
        ("no/a.md", "no folder no"),
    ],
)
def test_card_refuses_a_file(runs: Path, target: str, message: str) -> None:
    Path("there.md").write_text("mine")
    before = sorted(Path().iterdir())
    assert message in refuse(["runs", "card", "latest", "-o", target])[0]
    assert Path("there.md").read_text() == "mine"
    assert sorted(Path().iterdir()) == before


def test_card_needs_a_checkpoint_and_its_corpus(trained_run: Run, runs: Path) -> None:
    record = runs / trained_run.name / "run.json"
    record.write_text('{"status": "finished", "corpus_sha256": "another"}')
    error, hint = refuse_after_a_note(["runs", "card", "latest", "-o", "card.md"])
    assert "the corpus 'stories' is not the one" in error
    assert "restore it" in hint
    shutil.rmtree(runs / trained_run.name / "checkpoints")
    assert f"run {trained_run.id} has no checkpoint 'best'" in refuse(["runs", "card", "latest", "-o", "card.md"])[0]
    assert not Path("card.md").exists()


def refuse_after_a_note(arguments: list[str]) -> list[str]:
    """Like `refuse`, for a command that has said something before."""
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr.splitlines()[-2:]
