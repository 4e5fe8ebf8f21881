"""Reading what anybody may have written: whole, within bounds, at once, and by the letter of the format."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lumiere.errors import LumiereError, printable, shortened
from lumiere.files import MAX_DEPTH, parse_json, read_file


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, limit=5) == b"12345"
    with pytest.raises(OSError, match="More than 4 bytes"):
        read_file(path, limit=4)
    os.truncate(path, 2**40)  # a terabyte of holes
    with pytest.raises(OSError, match="More than 1,000 bytes"):
        read_file(path, limit=1000)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero"), tmp_path, tmp_path / "loop", tmp_path / "no"):
        with pytest.raises(OSError, match=r"Not a regular file|Is a directory|symbolic links|No such file"):
            read_file(path, limit=10)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_file(tmp_path / "link", limit=1) == b"a"


@pytest.mark.parametrize("text", ['{"a": [1, -2.5e3, "\\u00e9\\ud800", null, true]}', '"é"', " 7 ", str(2**63 - 1)])
def test_json_is_what_the_standard_library_reads(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


def test_a_byte_order_mark_does_no_harm() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


NOT_JSON = [
    *(b"", b"{", b"{'a': 1}", b"[1,]", b"[1] 2", b"\xff", b'"\xed\xa0\x80"', '{"a": 1}'.encode("utf-16")),
    *(b"NaN", b"[-Infinity]", b"1e999", b"9" * 10_000, str(2**63).encode(), b"[" * 100_000, b'{"a":' * 100_000),
    *(b'{"a": 1, "b": 2, "a": 1}', b'[{"a": {"x": 1, "x": 1}}]'),
]


def test_what_is_not_json_is_a_value_error() -> None:
    for data in NOT_JSON:
        with pytest.raises(ValueError):  # noqa: PT011 (of any wording)
            parse_json(data)


def test_json_is_nested_so_deep_and_no_deeper() -> None:
    def nested(depth: int) -> str:
        return "[" * depth + "]" * depth

    value: Any = parse_json(nested(MAX_DEPTH))
    for _ in range(MAX_DEPTH - 1):
        [value] = value
    assert value == []
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(nested(MAX_DEPTH + 1))


def test_an_error_is_two_printable_lines_whatever_is_in_it() -> None:
    error = LumiereError("no run '\x1b]0;title\x07\u202e\x9b31m\n' é", "look\rat\ud800 it")
    assert error.message == r"no run '\x1b]0;title\x07\u202e\x9b31m\n' é"
    assert error.hint == r"look\rat\ud800 it"
    assert str(error) == f"{error.message} ({error.hint})"
    assert LumiereError("a").hint is None


def test_printable_text_keeps_what_it_is_told_to() -> None:
    assert printable("a\n\tb\x1b\u200d", keep="\n") == "a\n\\tb\\x1b\\u200d"
    assert shortened("a" * 9, 9) == "a" * 9
    assert shortened("a" * 10, 9) == "aaaaaa..."
