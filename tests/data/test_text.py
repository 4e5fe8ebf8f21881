"""Plain text: what bytes become, and that no cut between pieces changes an id."""

import io
import re
import unicodedata
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from lumiere.data import text as text_module
from lumiere.data.stories import stories
from lumiere.data.text import Part, blocks, decode, decoded, lines, parts, pieces, plain
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import DataError

# Spaces of all kinds, marks that join what precedes them, characters that NFKC turns into a space and a mark or into
# several characters, contractions, and Hangul that is put together.
ODD = st.text(
    st.sampled_from("ab1s \n\t'.-\u00a0\u3000\u2028\x1c\u0301\u00a8\ufe70\u037aﬁＡ…\u1100\u1161\u11a8字\u200d👩"),
    max_size=60,
)
ANY = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(params=["nfkc", "nfc", "none"], scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train([*stories("train", 30), "a b\n\na\u0301 ﬁn … 字字 a's"], 600, 1, request.param)


def cut(text: str, size: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PIECE_CHARACTERS", size)
        return list(pieces([text]))


def assert_same_ids(tokenizer: Tokenizer, text: str, size: int) -> None:
    found = cut(text, size)
    assert "".join(found) == text
    assert list(chain(*tokenizer.encode_batch(found))) == tokenizer.encode_batch([text])[0]


# Bytes


@given(ANY | ODD | st.text(st.sampled_from("a\r\né字")), st.integers(1, 7), st.booleans())
def test_line_ends_are_those_of_python(text: str, size: int, has_mark: bool) -> None:
    data = (b"\xef\xbb\xbf" if has_mark else b"") + text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "BLOCK_BYTES", size)
        found = "".join(decoded(io.BytesIO(data), "name"))
    assert found == io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline=None).read()
    assert found == plain(data.decode("utf-8"))


@pytest.mark.parametrize(
    ("data", "line", "encoding"),
    [
        (b"caf\xe9", 1, "WINDOWS-1252"),
        (b"one\r\ntwo\rthree\nfo\xffur", 4, "WINDOWS-1252"),
        ("one\ntwo".encode("utf-16"), 1, "UTF-16"),
        ("one\ntwo".encode("utf-32"), 1, "UTF-32"),
        (b"cut \xe5\xad", 1, "WINDOWS-1252"),
        ("é\n".encode() * 3 + b"\xe9", 4, "WINDOWS-1252"),
    ],
)
@pytest.mark.parametrize("size", [2, 1000])
def test_other_encodings_name_the_line_and_iconv(
    data: bytes, line: int, encoding: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", max(size, 4))
    with pytest.raises(DataError, match=f"book.txt, line {line}:") as caught:
        decode(data, "books/book.txt")
    assert f"iconv -f {encoding} -t UTF-8 book.txt" in (caught.value.hint or "")


@given(st.text(st.sampled_from("ab\n\r\x0b\x85")), st.integers(1, 5))
def test_lines_end_with_line_ends_only(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "BLOCK_BYTES", size)
        patch.setattr(text_module, "open_file", lambda _: io.BytesIO(text.encode()))
        assert list(lines("name")) == re.findall(r"[^\n]*\n|[^\n]+", plain(text))


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(DataError, match="cannot be read"):
            list(blocks(str(path)))


# Pieces


@given(ODD | ANY, st.integers(1, 12))
@example("a\n\nb", 1)
@example("a \u0308b c", 1)
@example("a \u00a8b", 1)
@example("it 's 'sa", 1)
def test_pieces_have_the_ids_of_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    assert_same_ids(tokenizer, text, size)


def test_pieces_of_stories_have_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    text = "\n\n".join(stories("validation", 10))
    for size in (1, 1000):
        assert len(cut(text, size)) > len(text) / size / 20
        assert_same_ids(tokenizer, text, size)


def test_pieces_of_real_text_have_the_ids_of_the_whole(tokenizer: Tokenizer, wikitext: Path) -> None:
    path = next(wikitext.glob("*/validation-*.parquet"))
    text = "".join(parquet.read_table(path)["text"].to_pylist())[:200_000]
    assert len(cut(text, 1000)) > 150
    assert_same_ids(tokenizer, text, 1000)


@given(ODD, st.integers(1, 12))
@example("a \u0301b c", 1)
@example("a  b\n\nc", 1)
def test_cuts_are_before_a_single_space_or_line_end_and_no_mark(text: str, size: int) -> None:
    found = cut(text, size)
    for before, after in pairwise(found):
        assert not before[-1].isspace()
        assert after[0] in " \n"
        assert not after[1].isspace()
        assert not unicodedata.category(after[1]).startswith("M")


def test_a_long_text_without_a_place_to_cut_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(text_module, "MAX_PIECE_CHARACTERS", 40)
    assert list(pieces(["ACGT" * 9 + " ACGT"])) == ["ACGT" * 9, " ACGT"]
    with pytest.raises(DataError) as caught:
        list(pieces(["ACGT" * 11]))
    assert "fold" in (caught.value.hint or "")


@given(st.lists(ODD), st.integers(1, 12))
def test_the_last_part_is_marked_and_blank_documents_have_none(texts: list[str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PIECE_CHARACTERS", size)
        found: list[Part] = list(parts(iter(texts)))
    whole = "".join(texts)
    assert "".join(part.text for part in found) == (whole if whole.strip() else "")
    assert [part.is_last for part in found] == [False] * (len(found) - 1) + [True] * bool(found)


def test_a_file_is_read_as_its_pieces_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"word " * 1_000_000 + b"\xff")
    found: Iterator[Part] = parts(blocks(str(path)))
    assert len(next(found).text) <= text_module.PIECE_CHARACTERS
    with pytest.raises(DataError, match="line 1"):
        list(found)
