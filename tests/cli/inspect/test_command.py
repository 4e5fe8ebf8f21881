"""What all analyses share: options, JSON, files, pictures, receipts, exit codes, errors and the list of them."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from lumiere import __version__
from lumiere.cli import app
from lumiere.cli.inspect import ENTRIES
from lumiere.cli.inspect import app as inspect_app
from lumiere.cli.inspect.command import parse_indices
from lumiere.data.dataset import TokenizedCorpus
from lumiere.errors import LumiereError
from lumiere.persistence.runs import Run
from lumiere.persistence.tensor_files import hash_tensors
from tests.cli.inspect.commands import inspect, inspect_json

shown = partial(inspect_json, "attention")

PROVENANCE = {"analysis", "checkpoint", "corpus_sha256", "device", "dtype", "lumiere_version", "run", "schema_version"}
PROVENANCE |= {"seed", "source", "step", "token_ids", "token_labels", "tokenizer_sha256", "weights_sha256"}
STATISTICS = {"current", "distance", "entropy", "first", "mean_distance", "normalized_entropy", "previous"}
QUICK: dict[str, list[str]] = {
    "attention": ["--prompt", "One day a fox"],
    "heads": [],
    "lens": ["--prompt", "One day a"],
    "logits": ["--prompt", "One day a", "--by", "head"],
    "ablate": ["--batches", "2", "--batch-size", "3"],
    "tokens": ["--val", "1"],
    "cache": ["--prompt", "Once upon"],
    "dynamics": [],
    "diff": ["latest", "latest@previous", "--batches", "2", "--batch-size", "3"],
    "summary": ["--windows", "8"],
}
"""Options of each analysis; `report` is a page of all of them and has its own tests."""

Numbers = dict[str, Any]
Row = dict[str, str]


def flat(values: Any) -> list[Any]:
    return list(chain.from_iterable(values))


def series_value(numbers: Numbers, row: Row) -> float:
    series = list(zip(numbers["metrics"], numbers["places"], strict=True)).index((row["metric"], row["place"]))
    return numbers["values"][series][numbers["steps"].index(int(row["step"]))]


def weight_at(name: str, numbers: Numbers, row: Row) -> float:
    place = [int(row[axis]) for axis in ("layer", "head", "destination", "source") if axis in row]
    return np.array(numbers[name])[tuple(place)]


def head_value(numbers: Numbers, row: Row) -> float:
    head = numbers["copying"] if row["score"] == "copying" else numbers["scores"]
    value = head[int(row["layer"])][int(row["head"])]
    return value if row["score"] == "copying" else value[numbers["score_names"].index(row["score"])]


# Of each analysis: fields of its .npz file, a column of its .csv file, and what it contains row by row.
FILES: list[tuple[str, list[str], list[str], str, Callable[[Numbers, list[Row]], list[float]]]] = [
    ("attention", [], ["patterns"], "weight", lambda n, rows: [weight_at("patterns", n, row) for row in rows]),
    (
        "attention",
        ["--kind", "norm-weighted"],
        ["norms"],
        "norm",
        lambda n, rows: [weight_at("norms", n, r) for r in rows],
    ),
    (
        "attention",
        ["--kind", "rollout"],
        ["weights"],
        "weight",
        lambda n, rows: [weight_at("weights", n, r) for r in rows],
    ),
    ("heads", [], ["scores", "repeat_gap"], "value", lambda n, rows: [head_value(n, row) for row in rows]),
    ("lens", [], ["divergences"], "entropy", lambda n, rows: flat(n["entropies"])),
    (
        "ablate",
        ["--mode", "resample"],
        ["changes", "batch_changes"],
        "change",
        lambda n, rows: sorted(n["changes"])[::-1],
    ),
    ("tokens", [], ["losses", "bigram_losses"], "surprisal", lambda n, rows: n["surprisals"]),
    ("tokens", [], [], "unigram_loss", lambda n, rows: n["unigram_losses"]),
    ("cache", [], [], "num_bytes", lambda n, rows: n["num_bytes"]),
    ("dynamics", [], ["values", "steps"], "value", lambda n, rows: [series_value(n, row) for row in rows]),
    ("summary", [], ["gains", "writes"], "stable_rank", lambda n, rows: n["stable_ranks"]),
]


@pytest.mark.usefixtures("runs_dir")
@pytest.mark.parametrize(("name", "options", "fields", "column", "expected"), FILES)
def test_files_contain_the_same_numbers(
    name: str, options: list[str], fields: list[str], column: str, expected: Callable[..., list[float]]
) -> None:
    options = [*QUICK[name], *options]
    numbers = inspect_json(name, *options)
    for suffix in ("json", "csv", "npz"):
        result = inspect(name, *options, "-o", f"out.{suffix}")
        assert result.exit_code == 0, result.output
        assert f"written to out.{suffix}" in result.stderr
    assert json.loads(Path("out.json").read_text()) == numbers
    with np.load("out.npz") as saved:
        assert all(saved[field].tolist() == numbers[field] for field in fields)
        about = json.loads(str(saved["about"]))
        assert about == {key: value for key, value in numbers.items() if key not in saved.files}
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert [float(row[column]) for row in rows] == expected(numbers, rows)


@pytest.mark.parametrize("name", QUICK)
def test_verify_compares_with_float64(runs_dir: str, name: str) -> None:
    receipts = inspect_json(name, *QUICK[name], "--verify")["receipts"]
    assert receipts[-1]["law"] == "the same in float64"
    assert 0 < receipts[-1]["error"] < 1e-4
    assert all(receipt["holds"] and receipt["error"] <= receipt["tolerance"] for receipt in receipts)


@pytest.mark.parametrize(
    ("name", "module", "check"),
    [
        ("attention", "attention", "rows sum to 1"),
        ("heads", "head_scores", "rows sum to 1"),
        ("lens", "logit_lens", "no divergence is negative"),
        ("logits", "logit_attribution", "by head, the parts sum to the model's logit"),
        ("ablate", "ablation", "the loss with nothing ablated"),
        ("dynamics", "head_scores", "rows sum to 1"),
        ("summary", "summary", "the output head is the token embedding (tied)"),
    ],
)
def test_a_failed_check_exits_with_3_and_is_named(
    runs_dir: str, monkeypatch: pytest.MonkeyPatch, name: str, module: str, check: str
) -> None:
    monkeypatch.setattr(f"lumiere.interpret.{module}.rounding", lambda model: -1.0)
    result = inspect(name, *QUICK[name])
    assert result.exit_code == 3
    assert check in result.stderr
    assert "FAILED" in result.stdout


@pytest.mark.parametrize("name", QUICK)
def test_every_analysis_draws_itself(runs_dir: str, name: str) -> None:
    result = inspect(name, *QUICK[name], "-o", "out.svg")
    assert result.exit_code == 0, result.output
    text = Path("out.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    assert "checkpoint best" in text or name == "dynamics"


@pytest.mark.parametrize("suffix", [".html", ".svg", ".png"])
def test_without_matplotlib_a_picture_is_refused_at_once(
    runs_dir: str, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("lumiere.cli.inspect.command.open_model", None)
    assert "pip install matplotlib" in refused("attention", "-o", f"out{suffix}")


def test_json_says_where_the_result_comes_from(runs_dir: str, trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    result = shown("--runs-dir", runs_dir, "--prompt", "Once upon", "--seed", "3")
    assert result.keys() == PROVENANCE | STATISTICS | {"heads", "kind", "layers", "patterns", "receipts", "tokens"}
    assert result["run"] == trained_run.name
    assert result["lumiere_version"] == __version__
    assert result["weights_sha256"] == hash_tensors(trained_run.load_model("best").state_dict())
    assert result["tokenizer_sha256"] == tiny_corpus.tokenizer.fingerprint
    assert result["corpus_sha256"] == tiny_corpus.fingerprint
    assert (result["source"], result["seed"]) == ("prompt", 3)
    assert (result["device"], result["dtype"]) == ("cpu", "float32")
    assert len(result["token_labels"]) == len(result["token_ids"])


def test_layers_and_heads_are_chosen(runs_dir: str) -> None:
    everything, part = shown(), shown("--layer", "1", "--head", "1,0")
    assert (part["layers"], part["heads"]) == ([1], [1, 0])
    assert part["patterns"] == [[everything["patterns"][1][1], everything["patterns"][1][0]]]


def test_a_file_is_read_as_far_as_it_fits(runs_dir: str, tiny_corpus: TokenizedCorpus) -> None:
    Path("short.txt").write_text("One day")
    Path("long.txt").write_text("One day " * 40)
    short, long = (shown("--file", name) for name in ("short.txt", "long.txt"))
    assert short["token_ids"] == [0, *tiny_corpus.tokenizer.encode("One day")]
    assert short["source"] == "short.txt"
    whole = [0, *tiny_corpus.tokenizer.encode("One day " * 40)]
    assert long["token_ids"] == whole[:16]
    assert long["source"] == f"long.txt, its first 16 of {len(whole)} tokens"


def test_a_validation_window(runs_dir: str, trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    tokens, lengths = tiny_corpus.windows("validation", trained_run.load_config()).cut(np.array([2]))
    result = shown("--val", "2")
    assert result["token_ids"] == tokens[0, : min(lengths[0], 16)].tolist()
    assert result["source"] == "window 2 of the validation split of stories"


def test_random_tokens_are_repeated(runs_dir: str) -> None:
    first, same, other = (shown("--random", "7", "--seed", seed)["token_ids"] for seed in "112")
    assert first[0] == 0
    assert first[1:8] == first[8:]
    assert len(set(first[1:8])) == 7
    assert min(first[1:]) > 2
    assert same == first != other


def refused(name: str, *options: str) -> str:
    """What an analysis prints to stderr, if it exits with 2, prints two lines and writes nothing."""
    before = {path for path in Path().rglob("*") if not path.is_relative_to("runs")}
    result = inspect(name, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 2
    assert {path for path in Path().rglob("*") if not path.is_relative_to("runs")} == before
    return result.stderr


@pytest.mark.usefixtures("runs_dir")
@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("attention --prompt a --val 1", ["--prompt and --val"]),
        ("attention --val 100000", ["no window 100000"]),
        ("attention --random 8", ["8 random tokens"]),
        ("attention --file none.txt", ["none.txt"]),
        ("attention --file empty.txt", ["'empty.txt'"]),
        ("attention --prompt _", ["the prompt is empty"]),
        ("attention -o patterns.npy", [".npz"]),
        ("attention -o patterns.pgn", [".png"]),
        ("attention -o no/such/folder.npz", ["'no/such'"]),
        ("attention -o folder.npz", ["'folder.npz'"]),
        ("attention --layer 0-7", ["no layer 7"]),
        ("attention --head x", ["'x'"]),
        ("attention --kind rolout", ["'rolout'", "did you mean rollout?"]),
        ("attention --kind x", ["'x'", "norm-weighted, mean, max, rollout"]),
        ("ablate --unit heads", ["did you mean head?"]),
        ("ablate --mode zeros", ["did you mean zero?"]),
        ("ablate --unit layer --head 1", ["--head", "--unit head"]),
        ("ablate --neuron 1", ["add --unit neuron"]),
        ("ablate --pos 1", ["add --unit position"]),
        ("ablate --head 2", ["no head 2"]),
        ("ablate --layer 2", ["no layer 2"]),
        ("ablate --unit neuron --neuron 32", ["no neuron 32"]),
        ("ablate --unit position --prompt Once --pos 15", ["no position 15"]),
        ("ablate --mode resample --prompt Once_upon", ["use mean or zero"]),
        ("ablate --mode resample --batch-size 1 --batches 2", ["use mean or zero"]),
        ("ablate --random 1", ["--random 2"]),
        ("ablate --random 9", ["9 random tokens"]),
        ("ablate --prompt Once --random 3", ["--prompt and --random"]),
        ("ablate -o out.txt", ["'out.txt'"]),
        ("cache --names blocks.*.attn.hook_patern", ["did you mean blocks.0.attn.hook_pattern?"]),
        ("cache --names pattern -o out.npz", ["did you mean *pattern*?"]),
        ("cache --names blocks.2.*", ["'blocks.2.*'"]),
        ("dynamics -m inducton", ["'inducton'", "did you mean induction?"]),
        ("dynamics -m zzz", ["'zzz'", "validation-loss, "]),
        ("dynamics --random 8 -m norm", ["8 random tokens"]),
        ("dynamics --run zzz", ["'zzz'"]),
        ("dynamics --checkpoint best", ["--checkpoint"]),
        ("heads --random 3 --prompt a", ["--prompt and --random"]),
        ("lens --stat entrpy", ["'entrpy'", "did you mean entropy?"]),
        ("lens --stat x", ["'x'", "top, probability, rank, entropy, kl"]),
        ("lens --target 999", ["no token 999"]),
        ("lens --target zqx", ["'zqx' is 3 tokens: z q x"]),
        ("lens --pos 99", ["no position 99"]),
        ("lens --top-k 321", ["321", "320"]),
        ("logits --by heads", ["'heads'", "did you mean head?"]),
        ("logits --by x", ["'x'", "layer, head, neuron, source"]),
        ("logits --vs zqx", ["'zqx' is 3 tokens: z q x"]),
        ("logits --target e --vs e", ["--target and --vs"]),
        ("logits --vs e --raw", ["--raw and --vs"]),
        ("logits --vs e --log-prob", ["--log-prob and --vs"]),
        ("logits --raw --log-prob", ["--raw and --log-prob"]),
        ("summary --run zzzz", ["'zzzz'"]),
        ("summary --checkpoint bset", ["did you mean best?"]),
        ("tokens --prompt " + "Once_" * 20, ["16"]),
    ],
)
def test_bad_input_is_refused(command: str, named: list[str]) -> None:
    Path("empty.txt").write_text("\n")
    Path("folder.npz").mkdir()
    message = refused(*(word.replace("_", " ") if word[0] != "b" else word for word in command.split()))
    assert all(name in message for name in named), message


def test_a_run_without_snapshots_has_no_dynamics(trained_run: Run, tmp_path: Path) -> None:
    shutil.copytree(trained_run.path.parent, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / trained_run.name / "checkpoints" / "snapshots")
    assert f"run {trained_run.id} " in refused("dynamics", "--runs-dir", str(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("2", [2]),
        ("0-2", [0, 1, 2]),
        ("3,0", [3, 0]),
        ("4, 1-2 ,1", [4, 1, 2]),
        ("-1", [4]),
        ("-2--1", [3, 4]),
        ("3--1", [3, 4]),
    ],
)
def test_lists_and_ranges(text: str | None, indices: list[int]) -> None:
    assert parse_indices(text, 5, "layer") == indices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "layer 5 .*0 to 4"),
        ("-6", "layer -6"),
        ("0-9", "layer 9"),
        ("3-1", "3-1"),
        ("", "''"),
        ("1,,2", "''"),
        ("one", "'one'"),
        ("1-2-3", "'1-2-3'"),
        ("1.5", "'1.5'"),
    ],
)
def test_other_texts_are_no_lists(text: str, message: str) -> None:
    with pytest.raises(LumiereError, match=message):
        parse_indices(text, 5, "layer")


def test_the_tables_of_light_modules_are_those_of_the_library() -> None:
    """The commands repeat them, since their help loads no torch."""
    from lumiere.interpret.attention import COMBINED, WEIGHTED
    from lumiere.interpret.head_scores import THRESHOLD

    assert (*WEIGHTED, *COMBINED) == import_module("lumiere.cli.inspect.attention").KINDS
    parameters = typer.main.get_command(inspect_app).commands["heads"].params  # pyright: ignore[reportAttributeAccessIssue]
    assert {parameter.name: parameter.default for parameter in parameters}["threshold"] == THRESHOLD


def test_without_a_command_all_are_listed_with_their_questions() -> None:
    result = CliRunner().invoke(app, ["inspect"])
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    names = list(typer.main.get_command(inspect_app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(names) == sorted([*QUICK, "report"]) == sorted(entry.command.__name__ for entry in ENTRIES)
    for entry, first, second in zip(ENTRIES, lines[::2], lines[1::2], strict=False):
        assert first.split()[0] == entry.command.__name__
        assert entry.question in first
        assert first.endswith(f" {entry.cost}")
        assert second.strip() == entry.establishes
        assert entry.question.endswith("?") or entry.command.__name__ == "report"
    assert max(map(len, lines)) <= 80
