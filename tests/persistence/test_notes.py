"""Tags and notes stand beside a run's record, survive damage, and are never half written."""

import json
from typing import Any

import pytest

from lumiere.errors import LumiereError
from lumiere.persistence.notes import Notes, add_tags, read_notes, remove_tags, write_note
from lumiere.persistence.runs import Run


def test_tags_keep_their_order_and_come_once(run: Run) -> None:
    add_tags(run, ["b", "a"])
    assert add_tags(run, ["c", "a"]) == read_notes(run) == Notes(("b", "a", "c"))
    assert remove_tags(run, ["a"]) == read_notes(run) == Notes(("b", "c"))


def test_a_note_and_tags_do_not_touch_each_other_nor_the_record(run: Run) -> None:
    run.update(status="running")
    before = run.record_path.read_bytes()
    add_tags(run, ["a"])
    write_note(run, "  zwölf\nlines ")
    assert read_notes(run) == Notes(("a",), "zwölf\nlines")
    add_tags(run, ["b"])
    assert read_notes(run).text == "zwölf\nlines"
    assert write_note(run, "") == read_notes(run) == Notes(("a", "b"))
    assert run.record_path.read_bytes() == before
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "notes.json", "run.json"]


@pytest.mark.parametrize("tag", ["", "a b", "a/b", "é", "x" * 41, "\x1b[31m", "a\n"])
def test_what_is_no_tag_is_refused_and_writes_nothing(run: Run, tag: str) -> None:
    with pytest.raises(LumiereError, match="is not a tag"):
        add_tags(run, ["good", tag])
    assert not (run.path / "notes.json").exists()
    assert add_tags(run, ["x" * 40]).tags == ("x" * 40,)


def test_a_tag_that_is_not_there_cannot_be_removed(run: Run) -> None:
    add_tags(run, ["baseline"])
    with pytest.raises(LumiereError, match="has no tag 'basline'") as caught:
        remove_tags(run, ["basline"])
    assert caught.value.hint == "it has baseline; did you mean baseline?"


@pytest.mark.parametrize("text", ["\udc80", "ok \ud800"])
def test_a_note_that_is_no_text_is_refused(run: Run, text: str) -> None:
    with pytest.raises(LumiereError, match="not valid text"):
        write_note(run, text)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 5000, b"null"])
def test_damaged_notes_count_as_none_and_are_never_overwritten(run: Run, content: bytes) -> None:
    path = run.path / "notes.json"
    path.write_bytes(content)
    assert read_notes(run) == Notes()
    for change in (lambda: add_tags(run, ["a"]), lambda: write_note(run, "text")):
        with pytest.raises(LumiereError, match="damaged"):
            change()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("values", "notes"),
    [
        ({"tags": "abc", "note": 5}, Notes()),
        ({"tags": ["a", 1, None, "b c", "\x1b", "a"], "note": "x"}, Notes(("a",), "x")),
        ({"tags": {"a": 1}, "other": []}, Notes()),
    ],
)
def test_values_of_another_type_are_left_out(run: Run, values: Any, notes: Notes) -> None:
    (run.path / "notes.json").write_text(json.dumps(values))
    assert read_notes(run) == notes
