"""stdout and stderr: replace characters that the encoding lacks, and report a failed write without a traceback."""

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import TypeVar

from lumiere.errors import LumiereError

CLOSED_PIPE = 141
"""Exit code when the reader of stdout is gone: 128 + SIGPIPE, what a shell reports of `yes | head`."""

LOOKALIKES = {
    **dict(zip("▁▂▃▄▅▆▇█▀░▒▓·●│─¶–—−×‘’“”", "_.-~=+*##:+*_*|-P---x''\"\"", strict=True)),
    "…": "...",
    "±": "+-",
    "→": "->",
    "≈": "~",
    "↵": "/",
    "⇥": ">",
}
"""ASCII for what maps, bars, curves and tables are drawn with, and for common punctuation; the rest becomes `?`."""


class OutputError(Exception):
    """stdout cannot be written: its reader is gone, or its device is full. Not an OSError, which a file can raise too.

    Attributes:
        exit_code: `CLOSED_PIPE`, or 2.
        problem: what to tell the user; None if the reader is gone, which is no problem.
    """

    def __init__(self, error: OSError) -> None:
        is_closed_pipe = error.errno == errno.EPIPE
        self.exit_code = CLOSED_PIPE if is_closed_pipe else 2
        self.problem = None
        if not is_closed_pipe:
            reason = error.strerror or str(error)
            hint = "files and runs are complete; only what goes to stdout is missing"
            self.problem = LumiereError(f"cannot write to stdout: {reason}", hint)
        super().__init__(str(error))


class Stdout(io.TextIOWrapper):
    """Raises `OutputError` where a write fails, and drops all that follows."""

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
    """Ignores writes that fail: a lost progress line must not end a training run."""

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

    Without the latter, the first file that is opened would take the closed descriptor's number, and receive whatever a
    library prints. The null device is opened in the order of the descriptors, so each gets its own number.
    """
    codecs.register_error("lookalike", replace_unencodable)
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    sys.stdout = wrapped(sys.stdout, Stdout)
    sys.stderr = wrapped(sys.stderr, Stderr)


def wrapped(stream: object, kind: type[Stream]) -> Stream:
    """`stream` as a `kind`, with the same bytes below it; the null device for a stream that is closed."""
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
    """An error handler of `codecs`: a lookalike in ASCII for each character that cannot be encoded, or `?`."""
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(LOOKALIKES.get(character, "?") for character in characters), error.end


def is_unicode() -> bool:
    """Whether stdout takes every character."""
    return (sys.stdout.encoding or "ascii").lower().startswith("utf")
