"""What all analyses share: choice of the text, JSON, files, receipts and exit codes."""

import csv
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lumiere import __version__
from lumiere.cli import app
from lumiere.cli.inspect import app as inspect_app
from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.checkpoint import hash_tensors
from lumiere.persistence.runs import Run
from tests.cli.inspect.commands import inspect, inspect_json

inspect_attention = partial(inspect, "attention")
shown = partial(inspect_json, "attention")

ABOUT = [
    "analysis",
    "checkpoint",
    "corpus_sha256",
    "device",
    "dtype",
    "lumiere_version",
    "run",
    "schema_version",
    "seed",
]
ABOUT += ["source", "step", "token_ids", "token_labels", "tokenizer_sha256", "weights_sha256"]
STATISTICS = ["current", "distance", "entropy", "first", "mean_distance", "normalized_entropy", "previous"]
COMMANDS = [getattr(command.callback, "__name__", "") for command in inspect_app.registered_commands]
ANALYSES = [name for name in COMMANDS if name != "report"]  # which is a page of all of them, and no picture
QUICK = {
    "ablate": ["--batches", "1", "--batch-size", "2"],
    "diff": ["latest", "latest@previous", "--batches", "1"],
    "summary": ["--windows", "2"],
}
JSON_KEYS = sorted([*ABOUT, *STATISTICS, "heads", "kind", "layers", "patterns", "receipts", "tokens"])


def refused(*options: str) -> str:
    result = inspect_attention(*options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 2
    return result.stderr


def test_json_says_where_the_result_comes_from(runs_dir: str, trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    result = shown("--runs-dir", runs_dir, "--prompt", "Once upon", "--seed", "3")
    assert sorted(result) == JSON_KEYS
    assert result["run"] == trained_run.name
    assert result["lumiere_version"] == __version__
    assert result["weights_sha256"] == hash_tensors(trained_run.load_model("best").state_dict())
    assert result["tokenizer_sha256"] == tiny_corpus.tokenizer.fingerprint
    assert result["corpus_sha256"] == tiny_corpus.fingerprint
    assert result["source"] == "prompt"
    assert result["seed"] == 3
    assert (result["device"], result["dtype"]) == ("cpu", "float32")
    assert len(result["token_labels"]) == len(result["token_ids"])
    for receipt in result["receipts"]:
        assert receipt["holds"]
        assert 0 <= receipt["error"] <= receipt["tolerance"]


def test_layers_and_heads_are_chosen(runs_dir: str) -> None:
    everything = shown("--runs-dir", runs_dir)
    part = shown("--runs-dir", runs_dir, "--layer", "1", "--head", "1,0")
    assert (part["layers"], part["heads"]) == ([1], [1, 0])
    assert part["patterns"] == [[everything["patterns"][1][1], everything["patterns"][1][0]]]


def test_a_file_is_read_as_far_as_it_fits(runs_dir: str, tiny_corpus: TokenizedCorpus) -> None:
    Path("short.txt").write_text("One day")
    Path("long.txt").write_text("One day " * 40)
    short, long = (shown("--runs-dir", runs_dir, "--file", name) for name in ("short.txt", "long.txt"))
    assert short["token_ids"] == [0, *tiny_corpus.tokenizer.encode("One day")]
    assert short["source"] == "short.txt"
    whole = [0, *tiny_corpus.tokenizer.encode("One day " * 40)]
    assert long["token_ids"] == whole[:16]
    assert long["source"] == f"long.txt, its first 16 of {len(whole)} tokens"


def test_a_validation_window(runs_dir: str, trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    windows = tiny_corpus.windows("validation", trained_run.load_config())
    tokens, lengths = windows.cut(np.array([2]))
    result = shown("--runs-dir", runs_dir, "--val", "2")
    assert result["token_ids"] == tokens[0, : min(lengths[0], 16)].tolist()
    assert result["source"] == "window 2 of the validation split of stories"


def test_random_tokens_come_twice(runs_dir: str) -> None:
    first, same, other = (shown("--runs-dir", runs_dir, "--random", "7", "--seed", seed) for seed in "112")
    start, once, twice = first["token_ids"][0], first["token_ids"][1:8], first["token_ids"][8:]
    assert start == 0
    assert once == twice
    assert len(set(once)) == 7
    assert min(once) > 2
    assert same["token_ids"] == first["token_ids"] != other["token_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--val", "1"], "--prompt and --val are two texts"),
        (["--val", "100000"], "there is no window 100000"),
        (["--random", "8"], "8 random tokens twice do not fit the model"),
        (["--file", "none.txt"], "none.txt cannot be read"),
        (["--file", "empty.txt"], "'empty.txt' holds no text"),
        (["--prompt", " "], "the prompt is empty"),
        (["--output", "patterns.npy"], "did you mean .npz?"),
        (["--output", "patterns.pgn"], "did you mean .png?"),
        (["--output", "no/such/folder.npz"], "there is no folder 'no/such'"),
        (["--output", "folder.npz"], "'folder.npz' is a folder"),
        (["--layer", "0-7"], "there is no layer 7"),
        (["--head", "x"], "'x' is no head"),
    ],
)
def test_bad_input_is_refused(runs_dir: str, options: list[str], message: str) -> None:
    Path("empty.txt").write_text("\n")
    Path("folder.npz").mkdir()
    assert message in refused("--runs-dir", runs_dir, *options)
    assert sorted(path.name for path in Path().iterdir()) == ["empty.txt", "folder.npz"]


def test_files_hold_the_same_numbers(runs_dir: str) -> None:
    expected = shown("--runs-dir", runs_dir, "--layer", "0", "--prompt", "Once upon")
    for suffix in ("json", "csv", "npz"):
        options = ("--runs-dir", runs_dir, "--layer", "0", "--prompt", "Once upon", "-o", f"out.{suffix}")
        result = inspect_attention(*options)
        assert result.exit_code == 0, result.output
        assert f"written to out.{suffix}" in result.stderr
    assert json.loads(Path("out.json").read_text()) == expected
    with np.load("out.npz") as saved:
        assert saved["patterns"].tolist() == expected["patterns"]
        about = json.loads(str(saved["about"]))
    assert about == {key: value for key, value in expected.items() if key not in ("patterns", *STATISTICS)}
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    length = len(expected["token_ids"])
    assert len(rows) == 2 * length * (length + 1) / 2
    for row in rows:
        weight = expected["patterns"][0][int(row["head"])][int(row["destination"])][int(row["source"])]
        assert float(row["weight"]) == weight


def test_verify_computes_it_again(runs_dir: str) -> None:
    receipts = shown("--runs-dir", runs_dir, "--verify")["receipts"]
    assert receipts[-1]["law"] == "the same in float64"
    assert 0 < receipts[-1]["error"] < 1e-5


def test_a_broken_law_exits_with_3_and_is_named(runs_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumiere.interpret.attention.rounding", lambda model: -1.0)
    result = inspect_attention("--runs-dir", runs_dir)
    assert result.exit_code == 3
    assert "rows sum to 1" in result.stderr
    assert "FAILED" in result.stdout


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_draws_itself(runs_dir: str, name: str) -> None:
    result = CliRunner().invoke(app, ["inspect", name, "--runs-dir", runs_dir, *QUICK.get(name, ()), "-o", "out.svg"])
    assert result.exit_code == 0, result.output
    assert "written to out.svg" in result.stderr
    text = Path("out.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    assert "checkpoint best" in text or name == "dynamics"


@pytest.mark.parametrize("suffix", [".html", ".svg", ".png"])
def test_without_matplotlib_a_picture_is_refused_at_once(
    runs_dir: str, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("lumiere.cli.inspect.analysis.open_model", None)
    assert "pip install matplotlib" in refused("--runs-dir", runs_dir, "-o", f"out{suffix}")
    assert not list(Path().iterdir())
