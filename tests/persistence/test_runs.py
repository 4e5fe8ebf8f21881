"""Runs are made once, found by what people type, and never reached by a path."""

import dataclasses
import json
import math
import os
import random
import re
import secrets
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumiere.errors import LumiereError, RunNotFoundError
from lumiere.persistence.notes import add_tags
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run, RunStore
from tests.persistence.disks import FailingDisk

CARD_TIME = datetime(2025, 8, 19, 0, 18, 8)
CARD_NAME = "run_hiq6ihsb_20250819_001808"


def make(store: RunStore, *names: str) -> None:
    for name in names:
        (store.runs_dir / name / "checkpoints").mkdir(parents=True)


def error_of(store: RunStore, reference: str) -> RunNotFoundError:
    with pytest.raises(RunNotFoundError) as caught:
        store.open(reference)
    return caught.value


def test_a_new_run_is_a_folder_named_by_id_and_time(store: RunStore) -> None:
    run = store.create(CARD_TIME)
    assert re.fullmatch(r"run_[a-z0-9]{8}_20250819_001808", run.name)
    assert run.name == f"run_{run.id}_20250819_001808"
    assert run.created_at == CARD_TIME.astimezone(UTC)
    assert run.path == store.runs_dir / run.name
    assert [entry.name for entry in run.path.iterdir()] == ["checkpoints"]
    assert run.checkpoints_dir.is_dir()
    assert store.all() == [run]
    files = [run.config_path, run.tokenizer_path, run.metrics_path, run.record_path]
    assert files == [run.path / name for name in ("config.yaml", "tokenizer.json", "metrics.jsonl", "run.json")]


def test_the_runs_directory_explains_itself_and_is_ignored_by_git(store: RunStore) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    assert before <= store.create().created_at <= datetime.now(UTC)
    assert (store.runs_dir / ".gitignore").read_text() == "*\n"
    assert (store.runs_dir / "README.md").read_text().startswith("# Runs of Lumiere")
    (store.runs_dir / "README.md").write_text("mine")
    store.create()
    assert (store.runs_dir / "README.md").read_text() == "mine"


def test_a_folder_with_other_things_in_it_is_not_hidden_from_git(store: RunStore) -> None:
    store.runs_dir.mkdir()
    (store.runs_dir / "thesis.tex").write_text("")
    run = store.create()
    assert {entry.name for entry in store.runs_dir.iterdir()} == {"thesis.tex", run.name}


def test_an_id_that_is_taken_is_drawn_again(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = iter("aaaaaaaa" + "aaaaaaaa" + "bbbbbbbb")
    monkeypatch.setattr(secrets, "choice", lambda alphabet: next(letters))
    # A day apart, so that the folders' names differ anyway.
    assert store.create(CARD_TIME).id == "aaaaaaaa"
    assert store.create(CARD_TIME + timedelta(days=1)).id == "bbbbbbbb"


def test_a_folder_that_another_process_made_first_is_not_taken_over(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = iter("aaaaaaaa" + "bbbbbbbb")
    monkeypatch.setattr(secrets, "choice", lambda alphabet: next(letters))
    monkeypatch.setattr(store, "all", list)  # as if the other run came after the look
    make(store, "run_aaaaaaaa_20250819_001808")
    assert store.create(CARD_TIME).id == "bbbbbbbb"


def test_runs_come_newest_first_and_nothing_else_comes(store: RunStore) -> None:
    newest_first = [
        "run_aaaaaaaa_20260101_000000",
        "run_zzzzzzzz_20251231_235959",
        "run_mmmmmmmm_20251231_235958",
        "run_cccccccc_20241231_000000",
    ]
    make(store, *random.Random(1).sample(newest_first, 4))
    make(
        store,
        "run_aaaaaaa_20260101_000000",
        "run_AAAAAAAA_20260101_000000",
        "run_aaaaaaaa_20261301_000000",
        "run_aaaaaaaa_20260101_000000.bak",
        "run_aaaaaaaa_20260101_000000\n",
        "run_aaaaaaaa_٢٠٢٦٠١٠١_٠٠٠٠٠٠",
        "notes",
    )
    (store.runs_dir / "run_bbbbbbbb_20270101_000000").write_text("a file")
    assert [run.name for run in store.all()] == newest_first
    assert store.open("latest").name == newest_first[0]


def test_of_two_runs_of_one_second_the_one_written_last_is_newer(store: RunStore) -> None:
    first, second = store.create(CARD_TIME), store.create(CARD_TIME)
    for older, newer in ((first, second), (second, first)):
        os.utime(older.path, (1000, 1000))
        os.utime(newer.path, (1000, 1001))
        assert store.open("latest") == newer


RECORDED = {
    "run_aaaaaaaa_20261025_025500": "2026-10-25T02:55:00+02:00",  # summer time ends at 03:00, which is 02:00
    "run_bbbbbbbb_20261025_020500": "2026-10-25T01:05:00.000+00:00",  # ten minutes later
    "run_cccccccc_20261024_202000": "2026-10-24T20:20:00-05:00",  # another quarter of an hour later, in New York
}


def test_the_latest_run_is_the_one_made_last_in_whatever_time_zone(store: RunStore) -> None:
    make(store, *RECORDED)
    for name, created_at in RECORDED.items():
        Run(store.runs_dir / name).update(created_at=created_at)
    assert [run.id[0] for run in store.all()] == ["c", "b", "a"]
    assert store.open("latest").id == "cccccccc"
    assert str(store.open("aaaa").created_at) == "2026-10-25 00:55:00+00:00"


@pytest.mark.parametrize(
    "created_at", [None, 17, "yesterday", "2026-01-01T00:00:00", "0001-01-01T00:00:00+10:00", ["2026"], {}]
)
def test_without_a_time_in_the_record_the_name_counts(
    store: RunStore, created_at: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "XYZ-3")  # three hours ahead of UTC
    time.tzset()
    try:
        make(store, "run_aaaaaaaa_20260101_020000", "run_bbbbbbbb_00010101_000000")
        run = store.open("aaaa")
        run.update(created_at=created_at)
        assert run.created_at == datetime(2025, 12, 31, 23, tzinfo=UTC)
        assert store.open("latest") == run
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_run_is_found_by_name_id_and_every_unique_prefix(store: RunStore) -> None:
    make(store, CARD_NAME, "run_hiq7aaaa_20250820_000000")
    for reference in (CARD_NAME, "hiq6ihsb", "hiq6ihs", "hiq6"):
        assert store.open(reference).name == CARD_NAME
    assert store.open("hiq7").id == "hiq7aaaa"
    runs = store.open_all(["hiq7", "latest", "hiq6", "hiq7aaaa"])
    assert [run.id for run in runs] == ["hiq7aaaa", "hiq6ihsb"]


def test_a_prefix_of_several_runs_lists_them(store: RunStore) -> None:
    make(store, CARD_NAME, "run_hiq7aaaa_20250820_000000")
    error = error_of(store, "hiq")
    assert error.message == (
        f"'hiq' matches 2 runs in {store.runs_dir}/: run_hiq7aaaa_20250820_000000, run_hiq6ihsb_20250819_001808"
    )
    assert error.hint == "give more letters of the id, or the full name"
    make(store, *(f"run_hiq9000{i}_20240101_000000" for i in range(6)))
    assert error_of(store, "hiq").message.endswith("run_hiq90003_20240101_000000 and 3 more")


def test_the_full_name_decides_between_runs_with_the_same_id(store: RunStore) -> None:
    make(store, CARD_NAME, "run_hiq6ihsb_20250820_000000")
    assert store.open(CARD_NAME).name == CARD_NAME
    assert "matches 2 runs" in error_of(store, "hiq6ihsb").message


def test_an_unknown_run_is_an_error_that_helps(store: RunStore) -> None:
    for reference in ("latest", "hiq6"):
        error = error_of(store, reference)
        assert error.message == f"no run {reference!r} in {store.runs_dir}/"
        assert error.hint == "train one: lumiere train tiny"
    make(store, CARD_NAME)
    assert error_of(store, "hiq5ihsb").hint == "did you mean hiq6ihsb?"
    assert error_of(store, f"runs/{CARD_NAME}").hint == f"did you mean {CARD_NAME}?"
    assert error_of(store, "lastest").hint == "did you mean latest?"
    assert error_of(store, "0000").hint == "lumiere runs ls lists them"


def test_a_reference_never_reaches_outside_the_runs_directory(store: RunStore, tmp_path: Path) -> None:
    make(store, CARD_NAME)
    make(RunStore(tmp_path / "elsewhere"), CARD_NAME)
    outside = str(tmp_path / "elsewhere" / CARD_NAME)
    relative = f"../elsewhere/{CARD_NAME}"
    for reference in ("../../etc", "", ".", "..", "/", "/etc", "*", outside, relative, f"./{CARD_NAME}", "hiq6\0"):
        assert error_of(store, reference).message == f"no run {reference!r} in {store.runs_dir}/"


@given(reference=st.text())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_gives_a_run_or_one_printable_line(store: RunStore, reference: str) -> None:
    if not store.all():
        make(store, CARD_NAME)
    fitting = {CARD_NAME, "latest", *("hiq6ihsb"[:length] for length in range(1, 9))}
    if reference in fitting:
        assert store.open(reference).name == CARD_NAME
    else:
        assert error_of(store, reference).message.isprintable()


def test_the_runs_directory_is_the_argument_the_variable_or_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(tmp_path / "variable"))
    assert RunStore(tmp_path / "argument").runs_dir == tmp_path / "argument"
    store = RunStore()
    monkeypatch.setenv("LUMIERE_RUNS_DIR", "")
    assert store.runs_dir == tmp_path / "variable"
    assert RunStore().runs_dir == Path("runs")
    monkeypatch.delenv("LUMIERE_RUNS_DIR")
    monkeypatch.chdir(tmp_path)
    assert RunStore().create().path.resolve().parent == tmp_path / "runs"


def test_a_runs_directory_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = RunStore(tmp_path / "file")
    with pytest.raises(LumiereError, match="cannot be read: Not a directory"):
        store.all()
    with pytest.raises(LumiereError, match=r"no run can be made in .*: File exists"):
        store.create()


def test_updates_of_the_record_add_up_and_stay_valid_json(store: RunStore) -> None:
    run = store.create()
    assert run.record == RunRecord()
    run.update(status="running", command=["lumiere", "train"], step=1)
    run.update(status="finished", val_loss=math.nan)
    expected = {"status": "finished", "command": ["lumiere", "train"], "step": 1, "val_loss": None}
    assert run.record.to_json() == expected
    assert json.loads(run.record_path.read_text(), parse_constant=pytest.fail) == expected


DAMAGED_RECORDS = [
    b"",
    b'{"status": "fin',
    b"[1]",
    b"\xff",
    b"[" * 100_000,
    b'{"step": 1}',
    b'{"status": NaN}',
    b'{"status": "finished", "status": "failed"}',
    b'{"status": ' + b"9" * 10_000 + b"}",
    b'{"status": "finished", "a": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"status": "finished"}' + b" " * 4_000_000,
]


@pytest.mark.parametrize("content", DAMAGED_RECORDS)
def test_a_damaged_record_has_status_unknown_and_can_be_written_again(store: RunStore, content: bytes) -> None:
    run = store.create()
    run.record_path.write_bytes(content)
    assert run.record.status == "unknown"
    run.update(status="failed")
    assert run.record.status == "failed"


def test_a_record_that_is_no_file_is_never_waited_for(store: RunStore) -> None:
    run = store.create()
    os.mkfifo(run.record_path)
    assert run.status == "unknown"
    run.update(status="failed")
    assert run.status == "failed"
    run.record_path.unlink()
    run.record_path.mkdir()
    assert run.status == "unknown"
    with pytest.raises(LumiereError, match=r"run\.json' cannot be written: Is a directory"):
        run.update(status="failed")


def test_a_record_that_is_a_link_is_read_and_never_written_through(store: RunStore, tmp_path: Path) -> None:
    run = store.create()
    outside = tmp_path / "outside.json"
    outside.write_text('{"status": "failed"}')
    run.record_path.symlink_to(outside)
    assert run.status == "failed"
    run.update(status="finished")
    assert run.status == "finished"
    assert outside.read_text() == '{"status": "failed"}'


def test_any_text_in_a_record_survives_an_update(store: RunStore) -> None:
    run = store.create()
    run.record_path.write_text('{"error": "\\ud800 \\u001b", "status": ["a", {"b": 1}]}')
    run.update(step=1)
    assert run.record.to_json() == {"error": "\ud800 \x1b", "status": ["a", {"b": 1}], "step": 1}
    assert run.status == "unknown"


def test_links_that_lead_nowhere_are_no_runs(store: RunStore) -> None:
    make(store, CARD_NAME)
    (store.runs_dir / "run_bbbbbbbb_20260101_000000").symlink_to("nowhere")
    (store.runs_dir / "run_cccccccc_20260101_000000").symlink_to("run_cccccccc_20260101_000000")
    (store.runs_dir / "run_dddddddd_20260101_000000").symlink_to(CARD_NAME)
    assert [run.name for run in store.all()] == ["run_dddddddd_20260101_000000", CARD_NAME]


def test_a_failed_update_keeps_the_record(store: RunStore) -> None:
    run = store.create()
    run.update(status="running")
    with pytest.raises(LumiereError, match=r"run\.json' cannot be written: No space left"):
        Run(run.path, FailingDisk(1)).update(status="finished")
    assert run.record.to_json() == {"status": "running"}


@pytest.mark.parametrize("value", [None, 7, [], "text", {"status": 1, "step": "2", "splits": [], "splits_": {}}])
def test_a_record_of_other_types_is_empty(value: Any) -> None:
    record = RunRecord.from_json(value)
    assert dataclasses.replace(record, values={}) == RunRecord()


def test_a_record_keeps_what_has_the_right_type_and_every_key() -> None:
    values = {"step": 3, "best_loss": 1e400, "device": 7, "splits": {"train": {"num_tokens": 5}, "test": 1}, "new": [1]}
    record = RunRecord.from_json(values)
    assert (record.step, record.best_loss, record.device) == (3, None, None)
    assert record.splits == {"train": {"num_tokens": 5}}
    assert record.to_json() == {"status": "unknown"} | values


def test_a_tag_of_a_single_run_names_it(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    first, second = store.create(), store.create()
    add_tags(first, ["mine", "both"])
    add_tags(second, ["both", first.id])
    assert store.open("mine") == first
    assert store.open(first.id) == first, "an id comes before a tag"
    with pytest.raises(RunNotFoundError):
        store.open("both")
