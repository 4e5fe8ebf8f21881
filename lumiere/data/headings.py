"""Which rows match `dataset.document_start`: found in a process of its own, which is stopped if it takes too long.

A pattern such as `(a+)+$` takes time that doubles with each character, and nothing in this process could interrupt it.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from lumiere.errors import DataError, shortened

SECONDS = 5
"""How long a batch of rows may take, which takes microseconds by all but such patterns."""
CODE = """
import faulthandler, json, os, re, signal, sys, warnings
signal.signal(signal.SIGINT, signal.SIG_IGN)
warnings.simplefilter("ignore")
pattern, seconds = json.loads(sys.stdin.readline())
pattern, nowhere = re.compile(pattern), open(os.devnull, "w")
for line in sys.stdin:
    # Its clock is a thread that needs no lock of the interpreter.
    faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
    found = [pattern.search(row) is not None for row in json.loads(line)]
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(found), flush=True)
"""


class Matcher:
    """Tells which rows match a pattern; its process begins with the first rows and ends with the `with` block."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            with self._process, contextlib.suppress(BrokenPipeError):
                pass  # closes its input, upon which it ends

    def __call__(self, rows: Sequence[str]) -> Iterator[bool]:
        """Return for each row whether the pattern is found in it.

        Raises:
            DataError: It takes too long.
        """
        if not rows:
            return iter(())
        if self._process is None:
            command = [sys.executable, "-I", "-S", "-c", CODE]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._send([self._pattern, SECONDS])
        self._send(rows)
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise DataError(
                f"dataset.document_start '{shortened(self._pattern, 60)}' takes more than {SECONDS} seconds on a line",
                "write it without a repeat within a repeat, such as (a+)+",
            )
        return iter(json.loads(line))

    def _send(self, value: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # there is no line to read then
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
