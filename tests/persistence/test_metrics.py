"""metrics.jsonl survives kills, resumes and numbers that JSON does not have."""

import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lumiere.errors import LumiereError
from lumiere.persistence import metrics
from lumiere.persistence.metrics import (
    MetricsWriter,
    as_number,
    last_records,
    read_history,
    read_metrics,
    to_json,
    truncate_metrics,
)


def write(path: Path, *steps: int) -> None:
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write({"step": step, "loss": step / 10})


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_records_come_back_as_they_were_written_and_a_second_writer_goes_on(path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "epoch": 0, "loss": 8.317766166719343, "text": "é\n\u2028"},
        {"step": 2, "epoch": 0, "learning_rate": 3e-4},
    ]
    for number, record in enumerate(records, start=1):
        with MetricsWriter(path) as writer:
            writer.write(record)
            assert read_metrics(path) == records[:number], "before the writer is closed"
    assert path.read_bytes().count(b"\n") == 2


def test_nonfinite_numbers_become_null_at_any_depth(path: Path) -> None:
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": math.nan, "norms": [1.5, math.inf, {"mfu": -math.inf}]})
    expected = {"step": 1, "loss": None, "norms": [1.5, None, {"mfu": None}]}
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == expected


def test_a_record_needs_a_step(path: Path) -> None:
    with MetricsWriter(path) as writer, pytest.raises(ValueError, match="needs a step"):
        writer.write({"loss": 1.0})
    assert path.read_bytes() == b""


def test_truncation_keeps_the_lines_up_to_the_step_byte_for_byte(path: Path) -> None:
    write(path, 1, 2, 2, 3, 4)
    before = path.read_bytes().splitlines(keepends=True)
    truncate_metrics(path, last_step=2)
    assert path.read_bytes() == b"".join(before[:3])
    write(path, 3)
    assert steps(path) == [1, 2, 2, 3]
    truncate_metrics(path, last_step=-1)
    assert path.read_bytes() == b""
    truncate_metrics(path, last_step=5)
    assert steps(path) == []


def test_a_file_cut_at_any_byte_gives_its_whole_lines_and_can_go_on(path: Path) -> None:
    write(path, 1, 2, 3)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        # A line that lacks nothing but its line end is whole.
        expected = (whole[:length] + b"\n").count(b"}\n")
        assert steps(path) == [1, 2, 3][:expected]
        truncate_metrics(path, last_step=10)
        write(path, 7)
        assert steps(path) == [*[1, 2, 3][:expected], 7]


DAMAGED = [
    b'{"step": 2, "lo',
    b"",
    b"\xff\xfe",
    b"[2]",
    b'{"loss": 1}',
    b"[" * 99_000,
    b'{"step": true}',
    b'{"step": "2"}',
    b'{"step": 2.5}',
    b'{"step": 2, "loss": NaN}',
    b'{"step": 2, "loss": -Infinity}',
    b'{"step": 2, "loss": 1e999}',
    b'{"step": 2, "step": 2}',
    b'{"step": ' + b"9" * 10_000 + b"}",
    b'{"step": 2, "text": "' + b"a" * 100_000 + b'"}',
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_rewritten(path: Path, line: bytes) -> None:
    damaged = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(damaged)
    for use in (read_metrics, lambda path: truncate_metrics(path, 1)):
        with pytest.raises(LumiereError, match=r"line 2 of '.*metrics\.jsonl' is damaged"):
            use(path)
    assert path.read_bytes() == damaged


def test_what_is_no_file_is_named_and_never_waited_for(path: Path) -> None:
    def check(problem: str) -> None:
        for use in (read_metrics, lambda path: truncate_metrics(path, 1)):
            with pytest.raises(LumiereError, match=rf"metrics\.jsonl' cannot be read: {problem}"):
                use(path)
        with pytest.raises(LumiereError, match=r"metrics\.jsonl' cannot be written: "):
            MetricsWriter(path)

    with pytest.raises(LumiereError, match="cannot be written: No such file or directory"):
        MetricsWriter(path / "gone")
    path.mkdir()
    check("Is a directory")
    path.rmdir()
    os.mkfifo(path)
    check("Not a regular file")


def test_nothing_is_written_through_a_link(path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    path.symlink_to(outside)
    with pytest.raises(LumiereError, match="cannot be written"):
        MetricsWriter(path)
    assert not outside.exists()
    outside.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    truncate_metrics(path, 1)
    assert outside.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert path.read_bytes() == b'{"step": 1}\n'
    assert not path.is_symlink()


def test_a_file_with_holes_is_not_read_to_its_end(path: Path) -> None:
    path.write_bytes(b'{"step": 1}\n')
    os.truncate(path, 2**40)
    for use in (read_metrics, lambda path: truncate_metrics(path, 1)):
        with pytest.raises(LumiereError, match=r"line 2 of .* is damaged"):
            use(path)
    assert path.stat().st_size == 2**40


def fill(path: Path, size: int, width: int) -> int:
    """Write lines of `width` bytes, about `size` bytes of them; return how many."""
    line = b'{"step": %d, "loss": 1.5, "pad": "'
    with open(path, "wb") as file:
        for step in range(size // width):
            start = line % step
            file.write(start + b" " * (width - len(start) - 3) + b'"}\n')
    return size // width


def test_a_long_file_is_cut_in_little_memory(path: Path) -> None:
    count = fill(path, 20 * metrics.BLOCK_BYTES, 10_000)
    before = path.read_bytes()
    tracemalloc.start()
    truncate_metrics(path, count - 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.read_bytes() == before[:-20_000]
    assert peak < 4 * metrics.BLOCK_BYTES


@pytest.mark.slow
def test_a_file_above_a_gigabyte_is_cut_and_looked_at(path: Path) -> None:
    count = fill(path, 2**30 + 2**20, 90_000)
    truncate_metrics(path, count - 2)
    assert path.stat().st_size == 90_000 * (count - 1)
    assert read_history(path).training == ()  # the lines have no tokens
    assert last_records(path)[0]["step"] == count - 2


def test_json_that_is_written_steers_no_terminal(path: Path) -> None:
    record = {"step": 1, "text": "a\x1b[31m\x9b31m\x7f\u202e\u202f\u3000\U000e0001\ud800 é ·↵"}
    assert to_json(record).isprintable()
    assert json.loads(to_json(record)) == record
    assert "é ·↵" in to_json(record)
    with MetricsWriter(path) as writer:
        writer.write(record)
    assert read_metrics(path) == [record]


def test_there_are_no_metrics_before_the_first_line(path: Path) -> None:
    assert read_metrics(path) == []
    truncate_metrics(path, last_step=3)
    assert not path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, the disk that is always full")
def test_a_line_that_does_not_fit_on_the_disk_is_an_error_each_time() -> None:
    with MetricsWriter("/dev/full") as writer:
        for step in (1, 2):
            with pytest.raises(LumiereError, match="'/dev/full' cannot be written: No space left on device"):
                writer.write({"step": step})


def test_an_error_of_a_file_server_that_comes_late(path: Path) -> None:
    with pytest.raises(LumiereError, match="cannot be written"), MetricsWriter(path) as writer:
        os.close(writer._file.fileno())  # closing it again is an OSError, as on a server without room


def test_a_part_of_a_line_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NearlyFull:
        def write(self, data: bytes) -> int:
            return len(data) - 1

        def close(self) -> None:
            pass

    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.close()
    monkeypatch.setattr(writer, "_file", NearlyFull())
    with pytest.raises(LumiereError, match="No space left"):
        writer.write({"step": 1})


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0, 0),
        (-2.5, -2.5),
        *((other, None) for other in (True, "1", None, [], math.nan, -math.inf, 10**400)),
    ],
)
def test_only_numbers_that_can_be_shown_count_as_numbers(value: Any, number: float | None) -> None:
    assert as_number(value) == number
