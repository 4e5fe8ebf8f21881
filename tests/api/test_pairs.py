"""Prompts of an analysis that compares two: from options and from files, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import lumiere
from lumiere.api.options import Prompt
from lumiere.api.pairs import read_pairs
from lumiere.api.target import InspectTarget
from lumiere.errors import LumiereError
from lumiere.persistence.runs import Run


@pytest.fixture
def run(trained_run: Run) -> lumiere.OpenedRun:
    return lumiere.open(trained_run.path)


def target_of(run: lumiere.OpenedRun, prompt: Prompt = None) -> InspectTarget:
    return run.inspect._target(prompt)


def test_two_prompts_are_one_pair(run: lumiere.OpenedRun) -> None:
    found = target_of(run, [0, 70, 71])
    pairs, source = read_pairs(found, [0, 72, 71], target=5, vs=6, position=1)
    assert (pairs.clean.tolist(), pairs.corrupt.tolist(), source) == ([[0, 70, 71]], [[0, 72, 71]], None)
    assert pairs.targets is not None
    assert pairs.versus is not None
    assert [x.tolist() for x in (pairs.targets, pairs.versus, pairs.positions)] == [[5], [6], [1]]
    text, _ = read_pairs(target_of(run, "xyz"), "xyq")
    assert text.clean[0, :-1].tolist() == text.corrupt[0, :-1].tolist()
    assert text.targets is None


def test_a_file_has_a_pair_a_line(run: lumiere.OpenedRun) -> None:
    lines: list[dict[str, Any]] = [
        {"clean": [0, 70, 71], "corrupt": [0, 72, 71], "target": 5, "group": "a"},
        {"clean": "xy", "corrupt": "xq", "target": "z", "vs": 9, "group": "b"},
        {"clean": [0, 70, 73], "corrupt": [0, 72, 71], "group": "a"},
    ]
    Path("pairs.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    pairs, source = read_pairs(target_of(run), target=8, vs=7, pairs="pairs.jsonl")
    assert source == "3 pairs of pairs.jsonl"
    tokenizer = run.opened.tokenizer
    assert pairs.clean[1].tolist() == tokenizer.encode("xy", start=True)
    assert pairs.targets is not None
    assert pairs.versus is not None
    assert pairs.targets.tolist() == [5, *tokenizer.encode("z"), 8]
    assert pairs.versus.tolist() == [7, 9, 7]
    assert pairs.groups.tolist() == [0, 1, 0]
    assert pairs.positions.tolist() == [2, 2, 2]


GOOD = '{"clean": [0, 5], "corrupt": [0, 6], "target": 7}'
BAD = {
    "no JSON": "{",
    "another key": '{"clean": [0, 5], "corrupt": [0, 6], "targt": 7}',
    "a list": "[1]",
    "no corrupt prompt": '{"clean": [0, 5]}',
    "a number as a prompt": '{"clean": 5, "corrupt": [0, 6]}',
    "truth as an id": '{"clean": [0, true], "corrupt": [0, 6]}',
    "an id too large": '{"clean": [0, 5], "corrupt": [0, 100000]}',
    "an empty prompt": '{"clean": "", "corrupt": [0, 6]}',
    "two lengths": '{"clean": [0, 5, 6], "corrupt": [0, 6]}',
    "another length than line 1": '{"clean": [0, 5, 6], "corrupt": [0, 6, 6]}',
    "the same prompt": '{"clean": [0, 5], "corrupt": [0, 5]}',
    "too long": json.dumps({"clean": [5] * 99, "corrupt": [6] * 99}),
    "a target of two tokens": '{"clean": [0, 5], "corrupt": [0, 6], "target": "qz"}',
    "a target that is a list": '{"clean": [0, 5], "corrupt": [0, 6], "target": [7]}',
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_errors_name_the_line(run: lumiere.OpenedRun, line: str) -> None:
    Path("pairs.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(LumiereError, match=r"pairs\.jsonl, line 2: ") as refused:
        read_pairs(target_of(run), pairs="pairs.jsonl")
    assert refused.value.hint


def test_what_are_no_pairs_is_refused(run: lumiere.OpenedRun) -> None:
    Path("empty.jsonl").write_text("\n")
    Path("some.jsonl").write_text(GOOD + '\n{"clean": [0, 5], "corrupt": [0, 6]}\n')
    Path("itself.jsonl").write_text('{"clean": [0, 5], "corrupt": [0, 6], "target": 7, "vs": 7}\n')
    for file in ("empty.jsonl", "some.jsonl", "itself.jsonl", "missing.jsonl", "."):
        with pytest.raises(LumiereError) as refused:
            read_pairs(target_of(run), pairs=file)
        assert refused.value.hint
    ids = [0, 70, 71]
    contrasts: list[tuple[Prompt, dict[str, Any]]] = [
        (None, {"corrupt": ids}),
        (ids, {}),
        (ids, {"pairs": "some.jsonl"}),
        (ids, {"corrupt": [0, 72, 71], "position": 3}),
        (ids, {"corrupt": [0, 72, 71], "target": "no token"}),
        (ids, {"corrupt": [0, 72]}),
    ]
    for prompt, options in contrasts:
        with pytest.raises(LumiereError) as refused:
            read_pairs(target_of(run, prompt), **options)
        assert refused.value.hint
