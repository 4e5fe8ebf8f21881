"""`inspect probe`: labels from patterns, positions and files, a direction that steers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from lumiere.persistence.runs import Run
from tests.cli.commands import invoke, read_json, refuse

BOOK = "\n\n".join(f"One day a fox no {n} ran to {n} hens. The hen saw the fox and hid in a box." for n in range(12))


@pytest.fixture(autouse=True)
def files() -> None:
    Path("book.txt").write_text(BOOK)


def probe(*options: str) -> dict[str, Any]:
    return read_json("inspect", "probe", "--file=book.txt", "--layer=0", *options)


def test_the_direction_of_a_probe_steers(run: Run) -> None:
    found = probe("--regex=[aeiou]", "--save=p.safetensors", "--balanced")
    assert (found["classes"], found["stages"], found["chosen"]) == (["other", "match"], ["embedding", "L0"], 1)
    assert found["by_token"] > 0.9 > found["majority"]
    steered = read_json(
        "inspect", "steer", "--direction=p.safetensors", "--target=e", "--prompt=One day", "--batches=1"
    )
    assert steered["method"].startswith("probe: token matches [aeiou]")
    invoke("generate", "--prompt=One", "-n", "9", "--steer", "p.safetensors*0.5")


def test_properties_of_tokens(run: Run) -> None:
    assert len(probe("--property=previous-token", "--classes=2", "--windows=30")["classes"]) == 2
    found = probe("--property=next-token", "--regex=^ ")
    assert found["subject"] == "next token matches ^ "
    assert probe("--property=position", "--windows=30")["classes"][0] == "0-1"


def test_labels_of_a_file(run: Run, tmp_path: Path) -> None:
    from lumiere.persistence.loading import open_model

    opened = open_model(run.name, "best", "cpu", "runs")
    with Path("labels.jsonl").open("w") as file:
        for number in range(20):
            text = f"One fox {number}"
            tokens = opened.tokenizer.encode(text)
            labels = [None, *("odd" if token % 2 else 0 for token in tokens[1:])]
            file.write(json.dumps({"text": text, "labels": labels}) + "\n")
    found = read_json("inspect", "probe", "--labels=labels.jsonl")
    assert found["classes"] == ["0", "odd"]
    assert sum(found["num_documents"]) == 20
    assert found["by_token"] == 1
    assert sum(probe("--regex=o")["num_documents"]) == 12


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--regex [", "'['"),
        ("--file book.txt --regex zzzz", "'match'"),
        ("--regex a", "5 documents"),
        ("--property nextt", "next-token"),
        ("--property position --regex a", "--regex"),
        ("--split tset", "'tset'"),
        ("--property position --save p.safetensors", "two classes"),
        ("--regex a --save p.npz", "p.npz"),
        ("--labels short.jsonl", "line 1: 1 labels for"),
        ("--labels none.jsonl", "none.jsonl"),
        ("--labels bad.jsonl", "line 2"),
        ("--labels one.jsonl", "1 classes"),
        ("--labels short.jsonl --regex a", "--labels"),
        ("--file empty.txt --regex a", "'empty.txt'"),
        ("--file two.txt --regex a", "5 documents"),
        ("--layer 5", "no layer 5"),
    ],
)
def test_bad_input_is_refused(run: Run, options: str, named: str) -> None:
    Path("short.jsonl").write_text('{"text": "One day a fox", "labels": [1]}\n')
    Path("bad.jsonl").write_text('{"text": "e", "labels": [1]}\n{"text": 3}\n')
    Path("one.jsonl").write_text('{"text": "e", "labels": ["x"]}\n')
    Path("empty.txt").write_text("\n")
    Path("two.txt").write_text("One day\n\nA fox")
    assert named in " ".join(refuse("inspect", "probe", *options.split()))
