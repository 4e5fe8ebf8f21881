"""Wrap stdout and stderr: replace unencodable characters, and report failed writes without a traceback."""

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import TypeVar

from lumiere.errors import LumiereError

CLOSED_PIPE = 141
"""Exit code when the reader of stdout is gone: 128 + SIGPIPE, as in `yes | head`."""

LOOKALIKES = {
    **dict(zip("▁▂▃▄▅▆▇█▀░▒▓·●│─¶–—−×‘’“”", "_.-~=+*##:+*_*|-P---x''\"\"", strict=True)),
    "…": "...",
    "±": "+-",
    "→": "->",
    "≈": "~",
    "↵": "/",
    "⇥": ">",
}
"""ASCII for the characters of plots and tables and for punctuation; others become `?`."""


class OutputError(Exception):
    """A failed write to stdout. Not an OSError, which files raise too.

    Attributes:
        exit_code: `CLOSED_PIPE`, or 2.
        problem: The error to report; None if the reader is gone.
    """

    def __init__(self, error: OSError) -> None:
        is_closed_pipe = error.errno == errno.EPIPE
        self.exit_code = CLOSED_PIPE if is_closed_pipe else 2
        self.problem = None
        if not is_closed_pipe:
            reason = error.strerror or str(error)
            hint = "files and runs are complete; only the output is missing"
            self.problem = LumiereError(f"cannot write to stdout: {reason}", hint)
        super().__init__(str(error))


class Stdout(io.TextIOWrapper):
    """Raise `OutputError` on a failed write, and drop all later ones."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise self._lost(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> OutputError:
        # What is still buffered would fail again while Python exits.
        with suppress(OSError), open(os.devnull, "wb") as null_device:
            os.dup2(null_device.fileno(), self.fileno())
        return OutputError(error)


class Stderr(io.TextIOWrapper):
    """Ignore failed writes: a lost progress line must not end training."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


Stream = TypeVar("Stream", Stdout, Stderr)


def open_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr`; connect closed standard streams to the null device.

    Otherwise the next opened file would take the closed descriptor's number and receive what libraries print. Opening
    in the order of the descriptors gives each its own number.
    """
    codecs.register_error("lookalike", replace_unencodable)
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    sys.stdout = wrapped(sys.stdout, Stdout)
    sys.stderr = wrapped(sys.stderr, Stderr)


def wrapped(stream: object, kind: type[Stream]) -> Stream:
    """Wrap the binary stream below `stream`; the null device if it is closed."""
    if stream is None:
        return kind(open(os.devnull, "wb"), encoding="utf-8")
    assert isinstance(stream, io.TextIOWrapper)
    return kind(
        stream.buffer,
        encoding=stream.encoding,
        errors="lookalike",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Replace unencodable characters by ASCII lookalikes or `?`; an error handler for `codecs`."""
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(LOOKALIKES.get(character, "?") for character in characters), error.end


def is_unicode() -> bool:
    """Return whether stdout encodes every character."""
    return (sys.stdout.encoding or "ascii").lower().startswith("utf")
