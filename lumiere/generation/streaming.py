"""From tokens to text that can be shown at once: whole characters, and nothing that a stop string may take back."""

import codecs
from collections.abc import Sequence

from lumiere.data.text import plain
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import LumiereError


class TextStream:
    """The text of a row of tokens, given out as soon as it is certain.

    Args:
        tokenizer: the one that the model was trained with.
        stop: strings that end the text where they begin, wherever tokens are cut; they are not part of it. They are
            normalized as the training text was: after NFKC, `…` is `...`.

    Raises:
        LumiereError: if a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(tokenizer.normalize(plain(text)) for text in stop)
        if not all(self._stop):
            raise LumiereError("a stop string is empty", "an empty string is everywhere; leave it out")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; empty once a stop string has come."""
        return self._take(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> str:
        """What was held back, now that no token comes; bytes that are no character become U+FFFD."""
        text = self._take(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _take(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        cut = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
