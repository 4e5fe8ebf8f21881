"""Runs are filtered and sorted by what their small files say, whatever that is."""

import json
from datetime import datetime, timedelta
from typing import Any

import pytest

from lumiere.errors import LumiereError
from lumiere.persistence.catalog import SORTS, list_runs
from lumiere.persistence.notes import add_tags
from lumiere.persistence.runs import Run, RunStore

START = datetime(2025, 8, 19)


def make(store: RunStore, *records: dict[str, Any]) -> list[Run]:
    """Runs in this order of age, the first the oldest."""
    runs = []
    for minutes, record in enumerate(records):
        run = store.create(START + timedelta(minutes=minutes))
        run.record_path.write_text(json.dumps(record))
        runs.append(run)
    return runs


def order(store: RunStore, runs: list[Run], **options: Any) -> list[int]:
    return [runs.index(entry.run) for entry in list_runs(store, **options)]


RECORDS = [
    {"status": "finished", "best_loss": 2.0, "step": 10, "num_parameters": 5},
    {"status": "failed", "best_loss": None, "step": 30},
    {"status": "finished", "best_loss": 1.0, "step": 20, "num_parameters": 9},
    {"status": "running", "best_loss": 2.0, "step": "many", "num_parameters": True},
]


def test_sorting_puts_the_unknown_last_and_equals_newest_first(store: RunStore) -> None:
    runs = make(store, *RECORDS)
    orders = {"age": [3, 2, 1, 0], "loss": [2, 3, 0, 1], "steps": [1, 2, 0, 3], "parameters": [2, 0, 3, 1]}
    for sort, expected in orders.items():
        assert order(store, runs, sort=sort) == expected
    names = [entry.run.name for entry in list_runs(store, sort="name")]
    assert names == sorted(names)


def test_filters_and_limit(store: RunStore) -> None:
    runs = make(store, *RECORDS)
    assert order(store, runs, statuses=["finished"]) == [2, 0]
    assert order(store, runs, statuses=["finished", "failed"], sort="loss", limit=2) == [2, 0]
    add_tags(runs[0], ["a", "b"])
    add_tags(runs[3], ["a"])
    assert order(store, runs, tags=["a"]) == [3, 0]
    assert order(store, runs, tags=["a", "b"]) == [0]
    assert order(store, runs, tags=["c"]) == []


@pytest.mark.parametrize("value", [None, "x", [], {}, True, float("nan"), float("-inf"), 10**400, -(10**400)])
@pytest.mark.parametrize("sort", SORTS)
def test_records_of_any_type_are_sorted_last(store: RunStore, sort: str, value: Any) -> None:
    damaged: dict[str, Any] = dict.fromkeys(("status", "best_loss", "step", "num_parameters"), value)
    runs = make(store, RECORDS[0], damaged)
    found = order(store, runs, sort=sort)
    assert sorted(found) == [0, 1]
    if sort not in ("age", "name"):
        assert found == [0, 1]


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"statuses": ["finishd"]}, "there is no status 'finishd'", "did you mean finished?"),
        ({"sort": "zzz"}, "there is no order 'zzz'", "choose one of age, loss, steps, parameters, name"),
        ({"limit": 0}, "the limit must be at least 1, not 0", "leave --limit out to list all runs"),
        ({"tags": ["a b"]}, "'a b' is not a tag", "a tag is 1 to 40 letters, digits, dots, hyphens and underscores"),
    ],
)
def test_what_is_not_there_is_refused(store: RunStore, options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(LumiereError) as caught:
        list_runs(store, **options)
    assert (caught.value.message, caught.value.hint) == (message, hint)
