"""A training in a process of its own, caught while it runs."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO


@contextmanager
def midway(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """The process of `command` after its first evaluation, and what it goes on to say."""
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stderr
        line = ""
        while "validation loss" not in line:
            line = process.stderr.readline()
            assert line, "it ended before it could be stopped"
        yield process, process.stderr
