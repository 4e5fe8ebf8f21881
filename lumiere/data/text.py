"""Plain text: the one place that decodes bytes, normalizes line ends and splits long documents into pieces.

Corpora, `--text`, `--file`, prompts and stop strings all pass through here, so that models see the same characters as
in training.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from lumiere.errors import DataError
from lumiere.files import open_file

PIECE_CHARACTERS = 2**16
"""Characters encoded in one call, if the text can be split: the tokenizer needs 150 bytes per character."""
MAX_PIECE_CHARACTERS = 2**24
"""Maximum characters without a place to split."""
BLOCK_BYTES = 2**20

BYTE_ORDER_MARK = "\ufeff"
WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Encodings by byte-order mark; longer marks first, because one of them starts with a shorter one."""

DECOMPRESSORS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

CUT = re.compile(r"(?<=\S)[ \n](?=\w)")
"""Where a text can be split without changing its ids in our byte-level tokenizer: before a single space or line end
between two non-space characters, the second of which is no combining mark.

No pre-token of `ByteLevel` spans this place, and its only lookahead, at the end of white space, does not see across it.
Normalization does not act across it either: a space or line end neither composes with the character before it nor is
reordered."""


class Part(NamedTuple):
    """A piece of a document, and whether it is the last one."""

    text: str
    is_last: bool


def plain(text: str) -> str:
    """Normalize `text` as the decoder does: line ends become `\\n`, a leading byte-order mark is dropped."""
    return text.removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes, name: str) -> str:
    """Return the text in `data`; see `decoded`."""
    return "".join(decoded(io.BytesIO(data), name))


def read_text(path: str | Path) -> str:
    """Return the text of a file.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    return "".join(blocks(str(path)))


def blocks(path: str) -> Iterator[str]:
    """Yield the text of a file, which may be compressed, block by block.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    try:
        with open_file(path) as file:
            opened = DECOMPRESSORS.get(Path(path).suffix.lower(), lambda file: file)(file)
            yield from decoded(cast("BinaryIO", opened), path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{path} cannot be read: {reason}", "check the path") from None


def decoded(file: BinaryIO, name: str) -> Iterator[str]:
    """Decode UTF-8 block by block: line ends become `\\n`, a leading byte-order mark is dropped.

    Args:
        name: Name of the file, for the error.

    Raises:
        DataError: The bytes are not UTF-8. The hint names `iconv`.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    num_lines, beginning = 1, b""
    try:
        while block := file.read(BLOCK_BYTES):
            beginning = beginning or block[:4]
            text = decoder.decode(block)
            num_lines += text.count("\n")
            yield text
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode("utf-8", "replace")
        line = num_lines + plain(before).count("\n")
        encoding = next((own for mark, own in WIDE_ENCODINGS.items() if beginning.startswith(mark)), "WINDOWS-1252")
        source = Path(name).name
        raise DataError(
            f"{name}, line {line}: not UTF-8 text",
            f"convert it, for example: iconv -f {encoding} -t UTF-8 {source} > utf8-{source}",
        ) from None


def lines(path: str) -> Iterator[str]:
    """Yield the lines of a file with their line ends."""
    held = ""
    for block in blocks(path):
        *whole, held = (held + block).split("\n")
        yield from (line + "\n" for line in whole)
    if held:
        yield held


def parts(document: Iterable[str]) -> Iterator[Part]:
    """Split a document, given in strings of any lengths, into the parts that are encoded one by one; none if blank.

    Raises:
        DataError: It has `MAX_PIECE_CHARACTERS` without a place to split.
    """
    held: str | None = None
    for piece in pieces(document):
        if held is not None:
            yield Part(held, is_last=False)
        held = piece
    # Only the last piece can be blank: all others end with a non-space character.
    if held is not None and held.strip():
        yield Part(held, is_last=True)


def pieces(text: Iterable[str]) -> Iterator[str]:
    """Split a text, given in strings of any lengths, into pieces whose concatenated ids are those of the whole text.

    Raises:
        DataError: It has `MAX_PIECE_CHARACTERS` without a place to split.
    """
    held, searched = "", 0
    slices = (long[i : i + PIECE_CHARACTERS] for long in text for i in range(0, len(long), PIECE_CHARACTERS))
    for block in slices:
        held += block
        if len(held) < PIECE_CHARACTERS:
            continue
        # Resume the search one character back: at the end, the next character was unknown.
        if cut := last_cut(held, max(searched - 1, 0)):
            yield held[:cut]
            held = held[cut:]
        searched = len(held)
        if searched >= MAX_PIECE_CHARACTERS:
            raise DataError(
                f"the text has {searched:,} characters without a space or a line end between words",
                "break its lines: fold -w 80 FILE > folded.txt",
            )
    if held:
        yield held


def last_cut(text: str, first: int) -> int:
    """Return the last place to split at or after `first`; 0 if none."""
    for begin in (max(first, len(text) - 1024), first):
        cut = 0
        for match in CUT.finditer(text, begin):
            cut = match.start()
        if cut:
            return cut
    return 0
