"""Follows a metrics file while another process writes it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumiere.files import open_file
from lumiere.persistence.metrics import MAX_LINE_BYTES, parse_line


class MetricsFollower:
    """Gives each line of a metrics file once, as it comes, without reading the file again.

    Attributes:
        restarts: how often the file was cut back, as a resume does; the lines that `poll` gives then begin anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._last_line = b""
        self.restarts = 0

    def poll(self) -> Iterator[dict[str, Any]]:
        """The records that were written since the last call; none where there is no file yet.

        A last line that has no end yet waits for the next call, a damaged one is passed over.
        """
        try:
            with open_file(self._path) as file:
                # The line before tells whether this is still the same text: a resume may have cut the file, and
                # training may have written past the old place since.
                file.seek(self._offset - len(self._last_line))
                if file.read(len(self._last_line)) != self._last_line:
                    self._offset, self._last_line = 0, b""
                    self.restarts += 1
                    file.seek(0)
                while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                    self._offset += len(line)
                    self._last_line = line
                    record = parse_line(line)
                    if record is not None:
                        yield record
        except OSError:
            return
