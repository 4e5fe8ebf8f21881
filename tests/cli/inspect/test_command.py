"""What all analyses share: options, JSON, files, pictures, receipts, exit codes, errors and the list of them."""

import csv
import json
import re
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from lumiere import __version__
from lumiere.api.inspection import KINDS
from lumiere.cli.inspect import ENTRIES
from lumiere.cli.inspect import app as inspect_app
from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.runs import Run
from lumiere.persistence.tensor_files import hash_tensors
from tests.cli.commands import invoke, refuse, stdout_of
from tests.cli.inspect.commands import printed, shown

README = Path(__file__).parents[3] / "README.md"
# Options for a quick run. `report` is a page of all of them, `claims` reads a file; both have their own tests.
QUICK = {
    "attention": ("--prompt=One day a fox",),
    "heads": (),
    "lens": ("--prompt=One day a",),
    "logits": ("--prompt=One day a", "--by=head"),
    "ablate": ("--batches=2", "--batch-size=3"),
    "patch": ("--prompt=One day a fox", "--corrupt=One day a dog", "--target=b", "--vs=c"),
    "saliency": ("--prompt=One day a fox", "--steps=20"),
    "circuit": ("--prompt=One day a", "--corrupt=One day b", "--target=e", "--vs=a"),
    "probe": (f"--file={README}", "--regex=e", "--windows=40", "--layer=0"),
    "steer": ("--token=e", "--batches=1", "--batch-size=2", "--prompt=One day a"),
    "tokens": ("--val=1",),
    "cache": ("--prompt=Once upon",),
    "dynamics": ("--metric=induction", "--metric=validation-loss", "--metric=norm", "--every=3"),
    "diff": ("latest", "latest@previous", "--batches=2", "--batch-size=3"),
    "summary": ("--windows=8",),
    "weights": ("--layer=1", "--directions=1"),
}

Numbers = dict[str, Any]
Row = dict[str, str]


def column(name: str) -> Callable[[Numbers, Row], float]:
    """Look up the values of a table in an array of the JSON, by the table's axes."""

    def value(numbers: Numbers, row: Row) -> float:
        axes = ("layer", "head", "destination", "source")
        return np.array(numbers[name])[tuple(int(row[axis]) for axis in axes if axis in row)]

    return value


def series_value(numbers: Numbers, row: Row) -> float:
    series = list(zip(numbers["metrics"], numbers["places"], strict=True)).index((row["metric"], row["place"]))
    return numbers["values"][series][numbers["steps"].index(int(row["step"]))]


def head_value(numbers: Numbers, row: Row) -> float:
    name = row["score"]
    value = numbers["copying" if name == "copying" else "scores"][int(row["layer"])][int(row["head"])]
    return value if name == "copying" else value[numbers["score_names"].index(name)]


# An analysis and its options; a column of its .csv file, and what it contains: a key of the JSON with the same order,
# or a function of JSON and row.
TABLES: list[tuple[str, str, str | Callable[[Numbers, Row], float]]] = [
    ("attention", "weight", column("patterns")),
    ("attention --kind=norm-weighted", "norm", column("norms")),
    ("attention --kind=rollout", "weight", column("weights")),
    ("heads", "value", head_value),
    ("lens", "entropy", "entropies"),
    ("ablate --mode=resample", "change", "changes"),
    ("saliency", "occlusion", "occlusion"),
    ("tokens", "surprisal", "surprisals"),
    ("cache", "num_bytes", "num_bytes"),
    ("dynamics", "value", series_value),
    ("summary", "stable_rank", "stable_ranks"),
]


@pytest.mark.parametrize(("command", "name", "expected"), TABLES)
def test_a_table_contains_the_numbers_of_the_json(
    command: str, name: str, expected: str | Callable[[Numbers, Row], float]
) -> None:
    analysis, *own = command.split()
    numbers = json.loads(invoke("inspect", analysis, *QUICK[analysis], *own, "--json", "-o", "out.csv").stdout)
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [float(row[name]) for row in rows]
    assert found
    if callable(expected):
        assert found == [expected(numbers, row) for row in rows]
    elif analysis == "ablate":
        assert found == sorted(numbers[expected], reverse=True)
    else:
        values = numbers[expected]
        assert found == (list(chain.from_iterable(values)) if isinstance(values[0], list) else values)


def test_files_contain_the_json_or_its_arrays() -> None:
    numbers = shown("tokens")
    for suffix in ("json", "npz"):
        assert f"written to out.{suffix}" in invoke("inspect", "tokens", "-o", f"out.{suffix}").stderr
    assert json.loads(Path("out.json").read_text()) == numbers
    with np.load("out.npz") as saved:
        arrays = {name: saved[name].tolist() for name in saved.files}
    assert json.loads(arrays.pop("about")) | arrays == numbers
    assert {"losses", "bigram_losses"} <= arrays.keys()


@pytest.mark.parametrize("name", QUICK)
def test_json_verification_and_picture(name: str, golden: Callable[[str, str], str]) -> None:
    result = invoke("inspect", name, *QUICK[name], "--verify", "--json", "-o", "out.svg")
    numbers = json.loads(result.stdout)
    keys = "".join(f"{key}\n" for key in numbers)
    assert keys == golden(f"inspect_{name}.txt", keys)
    assert all(receipt["holds"] and receipt["error"] <= receipt["tolerance"] for receipt in numbers["receipts"])
    assert numbers["receipts"][-1]["law"] == "the same in float64"
    # The weights are computed with in float64 either way.
    assert (0 if name == "weights" else 1e-300) <= numbers["receipts"][-1]["error"] < 1e-4
    picture = Path("out.svg").read_text(encoding="utf-8")
    assert picture.startswith("<?xml")
    facts = " ".join(re.sub("<[^>]*>", " ", picture).split())
    for side in (numbers, numbers.get("other", numbers)):
        assert f"{side['run']}, checkpoint {side['checkpoint']} (step {side['step']})" in facts
    printed(name, *QUICK[name])


@pytest.mark.parametrize("command", ["attention", "dynamics -m induction"])
def test_a_failed_check_exits_with_3_and_is_named(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    for module in ("attention", "head_scores"):
        monkeypatch.setattr(f"lumiere.interpret.{module}.rounding", lambda model: -1.0)
    result = invoke("inspect", *command.split(), code=3)
    assert "rows sum to 1" in result.stderr
    assert "FAILED" in result.stdout


def test_without_matplotlib_a_picture_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("lumiere.persistence.loading.open_model", None)
    assert "pip install matplotlib" in refuse("inspect", "attention", "-o", "out.svg")[1]


def test_json_contains_the_provenance(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    result = shown("attention", "--prompt", "Once upon", "--seed", "3")
    expected = {
        "run": trained_run.name,
        "lumiere_version": __version__,
        "weights_sha256": hash_tensors(trained_run.load_model("best").state_dict()),
        "tokenizer_sha256": tiny_corpus.tokenizer.fingerprint,
        "corpus_sha256": tiny_corpus.fingerprint,
        "source": "prompt",
        "seed": 3,
        "device": "cpu",
        "dtype": "float32",
    }
    assert {key: result[key] for key in expected} == expected
    assert len(result["token_labels"]) == len(result["token_ids"])


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("attention --prompt a --val 1", "--prompt and --val"),
        ("attention --val 100000", "no window 100000"),
        ("attention --random 8", "8 random tokens"),
        ("attention --file none.txt", "none.txt"),
        ("attention --file empty.txt", "'empty.txt'"),
        ("attention --prompt _", "the prompt is empty"),
        ("attention -o patterns.npy", ".npz"),
        ("attention -o patterns.pgn", ".png"),
        ("attention -o no/such/folder.npz", "'no/such'"),
        ("attention -o folder.npz", "'folder.npz'"),
        ("attention --layer 0-7", "no layer 7"),
        ("attention --kind rolout", "'rolout' .*did you mean rollout?"),
        ("ablate --unit heads", "did you mean head?"),
        ("ablate --unit layer --head 1", "--head .*--unit head"),
        ("ablate --neuron 1", "add --unit neuron"),
        ("ablate --pos 1", "add --unit position"),
        ("ablate --head 2", "no head 2"),
        ("ablate --unit position --prompt Once --pos 15", "no position 15"),
        ("ablate --mode resample --prompt Once_upon", "use mean or zero"),
        ("patch --prompt Once", "--corrupt TEXT"),
        ("patch --corrupt Once", "--prompt TEXT"),
        ("patch --prompt ab --corrupt abc", "3 tokens.*4.*became"),
        ("patch --prompt ab --corrupt ac --target qzx", "qzx"),
        ("patch --prompt ab --corrupt ac --site attn", "attn_out"),
        ("patch --prompt ab --corrupt ac --unit 1", "--by unit"),
        ("patch --prompt ab --corrupt ac --site z --pos 1", "--by position"),
        ("patch --prompt ab --pairs none.jsonl", "one of them"),
        ("patch --pairs none.jsonl", "none.jsonl"),
        ("ablate --together L0H0", "L0H1"),
        ("ablate --together L0H0+L0H7 --batches 1", "no head 7"),
        ("ablate --together pairs --unit neuron", "omit --unit"),
        ("ablate --random 1", "--random 2"),
        ("cache --names blocks.*.attn.hook_patern", "did you mean blocks.0.attn.hook_pattern?"),
        ("cache --names pattern -o out.npz", r"did you mean \*pattern\*?"),
        ("cache --names blocks.2.*", r"'blocks.2.\*'"),
        ("cache --dtype float16", "--dtype needs --split"),
        ("cache --format parquet", "--format needs --split"),
        ("cache --split validation", "-o DIR"),
        ("cache --split validation -o out.npz", "-o DIR"),
        ("cache --split valid -o new", "'valid' .*validation"),
        ("cache --split validation -o new --dtype float8", "'float8'"),
        ("cache --split validation -o new --format npz", "'npz'"),
        ("cache --split validation -o new --prompt Once", "--prompt"),
        ("cache --split validation -o new --context-size 4", "--context-size"),
        ("cache --split validation -o new --names *.hook_pattern", "axes H T S"),
        ("cache --split validation -o .", "other files"),
        ("cache --split validation -o empty.txt", "empty.txt"),
        ("dynamics -m inducton", "'inducton' .*did you mean induction?"),
        ("dynamics --run zzz", "'zzz'"),
        ("dynamics --checkpoint best", "--checkpoint"),
        ("lens --stat entrpy", "'entrpy' .*did you mean entropy?"),
        ("lens --target zqx", "'zqx' is 3 tokens: z q x"),
        ("lens --pos 99", "no position 99"),
        ("lens --top-k 321", "321 .*320"),
        ("logits --by heads", "'heads' .*did you mean head?"),
        ("logits --target e --vs e", "--target and --vs"),
        ("logits --vs e --raw", "--raw and --vs"),
        ("logits --vs e --log-prob", "--log-prob and --vs"),
        ("logits --raw --log-prob", "--raw and --log-prob"),
        ("saliency --target zqx", "'zqx' is 3 tokens: z q x"),
        ("saliency --target e --vs e", "--target and --vs"),
        ("saliency --vs e --log-prob", "--log-prob and --vs"),
        ("saliency --baseline means", "'means' .*did you mean mean?"),
        ("saliency --quadrature gaus", "'gaus' .*did you mean gauss?"),
        ("saliency --steps 4097", "--steps 4097 .*4096"),
        ("saliency --pos 99", "no position 99"),
        ("circuit --prompt One_day", "--corrupt"),
        ("circuit --prompt a --corrupt zqx", "they must align"),
        ("circuit --prompt a --corrupt a", "are the same"),
        ("circuit --prompt a --corrupt b --ablation noise", "'noise'"),
        ("circuit --prompt a --corrupt b --by eapig", "'eapig' .*did you mean eap-ig?"),
        ("circuit --prompt a --corrupt b --target e --max-edges 9", "more than 9: .*--by eap"),
        ("circuit --prompt a --corrupt b --target zqx", "'zqx' is 3 tokens: z q x"),
        ("summary --checkpoint bset", "did you mean best?"),
        ("tokens --prompt " + "Once_" * 20, "16"),
        ("report -o page.pdf", "'page.pdf' .*ends in .html"),
        ("report -o no/page.html", "'no' "),
        ("report --prompt _", "the prompt is empty .*validation split"),
        ("report --prompt " + "One_day_" * 20, "the model sees 16 .*shorten it"),
    ],
)
def test_bad_input_is_refused(command: str, named: str) -> None:
    Path("empty.txt").write_text("\n")
    Path("folder.npz").mkdir()
    before = set(Path().rglob("*"))
    name, *options = command.split()
    prompt = options.index("--prompt") + 1 if "--prompt" in options else -1
    options = [word.replace("_", " ") if place == prompt else word for place, word in enumerate(options)]
    message = " ".join(refuse("inspect", name, *options))
    assert re.search(named.removesuffix("?"), message), message
    assert set(Path().rglob("*")) == before


def test_the_tables_of_light_modules_are_those_of_the_library() -> None:
    """The commands repeat them, since their help loads no torch."""
    from lumiere.interpret.attention import COMBINED, WEIGHTED
    from lumiere.interpret.head_scores import THRESHOLD

    assert (*WEIGHTED, *COMBINED) == KINDS
    commands: Any = typer.main.get_command(inspect_app)
    assert {option.name: option.default for option in commands.commands["heads"].params}["threshold"] == THRESHOLD
    names = [command.__name__ for command in ENTRIES]
    assert sorted(commands.commands) == sorted(names) == sorted([*QUICK, "report", "claims"])


def test_without_a_command_all_are_listed_with_their_questions() -> None:
    lines = stdout_of("inspect").splitlines()
    assert max(map(len, lines)) <= 80
    for (command, entry), first, second in zip(ENTRIES.items(), lines[::2], lines[1::2], strict=False):
        establishes, cost = entry
        doc = command.__doc__ or ""
        question = doc[: doc.index("?") + 1] if "?" in doc else doc.partition(",")[0]
        assert first.startswith(f"{command.__name__} ")
        assert f" {question} " in first
        assert first.endswith(f" {cost}")
        assert second.strip() == establishes
        assert question.endswith("?") or command.__name__ == "report"
