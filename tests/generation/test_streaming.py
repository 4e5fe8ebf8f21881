"""Text in whole characters, and nothing that a stop string takes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import LumiereError
from lumiere.generation.decoding import TextStream


class Bytes:
    """A token is a byte."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def normalize(self, text: str) -> str:
        return text


def pushed(text: bytes, stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(Bytes(), stop)  # type: ignore[arg-type]
    pieces = [stream.push(byte) for byte in text]
    return [*pieces, stream.finish()], stream.is_stopped


def test_no_piece_holds_half_a_character() -> None:
    assert pushed("a😀é!".encode(), [])[0] == ["a", "", "", "", "😀", "", "é", "!", ""]
    assert pushed("😀".encode()[:3], [])[0] == ["", "", "", "\ufffd"]


def test_a_stop_string_ends_the_text_where_it_begins() -> None:
    assert pushed(b"one. Two", [". T"]) == (["o", "n", "e", "", "", "", "", "", ""], True)
    # What only looked like one comes after all.
    assert pushed(b"a.b", [". T"]) == (["a", "", ".b", ""], False)
    assert pushed(b"aab", ["ab"]) == (["", "a", "", ""], True)
    assert pushed(b"x..", ["...", "!"]) == (["x", "", "", ".."], False)


def test_a_stop_string_across_the_border_of_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("Once there was a fox. It slept.")
    for stop in ("e was a", "x. I", "fox"):
        stream = TextStream(tokenizer, [stop])
        text = "".join(stream.push(token) for token in tokens) + stream.finish()
        assert text == "Once there was a fox. It slept.".partition(stop)[0]
        assert stream.is_stopped


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_the_text_is_what_stands_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, is_stopped = pushed(text.encode(), stop)
    # The earliest end, since the text is read from its beginning; then its earliest beginning.
    ends = [text.find(each) + len(each) for each in stop if each in text]
    shown = text[: min(ends)] if ends else text
    begins = [shown.find(each) for each in stop if each in shown]
    assert "".join(pieces) == (shown[: min(begins)] if ends else text)
    assert is_stopped == bool(ends)


@pytest.mark.parametrize(("stop", "text"), [("…", "Wait... No"), ("\r\nＮ", "a\nNo"), ("ﬁ", "a fish")])
def test_a_stop_string_is_what_the_model_writes(tokenizer: Tokenizer, stop: str, text: str) -> None:
    stream = TextStream(tokenizer, [stop])
    written = "".join(map(stream.push, tokenizer.encode(text))) + stream.finish()
    assert stream.is_stopped
    assert text.startswith(written)
    assert len(written) < len(text)


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(LumiereError, match="a stop string is empty"):
        TextStream(tokenizer, ["a", ""])
