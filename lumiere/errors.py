"""Errors that a user can fix. Any other exception is a bug and keeps its traceback."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any


class LumiereError(Exception):
    """Something the user can fix.

    The command line prints `error: <message>` and `hint: <hint>` and exits with code 2. Control characters in both are
    made visible, so that names and values from files or a shell cannot control the terminal.

    Args:
        message: What is wrong, with the name and the value at fault.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = printable(message)
        self.hint = None if hint is None else printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(LumiereError):
    """An unusable config file or override."""


class DataError(LumiereError):
    """A corpus that cannot be read or holds no text."""


class RunNotFoundError(LumiereError):
    """A run that does not exist, or an ambiguous reference."""


class RunBusyError(LumiereError):
    """A run that another process is training."""


class CheckpointError(LumiereError):
    """A missing or damaged checkpoint."""


class TransferError(LumiereError):
    """A run at another place that is not what it should be."""


class NonFiniteError(LumiereError):
    """NaN or infinity in the loss, gradients or weights of a training run."""


class LostProcessError(LumiereError):
    """Another process of the training run ended while this one waited for it."""


class RankTimeoutError(LostProcessError):
    """Other processes of the training run hang; the message names their ranks."""


class FailedCheckError(LumiereError):
    """Numbers that differ from those they were checked against. The command line exits with code 3."""


def printable(text: str, keep: str = "") -> str:
    """Return `text` with unprintable characters escaped, except those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def shortened(text: str, length: int = 200) -> str:
    """Return `text`, truncated to `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that `name` misspells, or None.

    They differ by at most one edit, or two if `name` has more than five characters; case is ignored. Names that merely
    have much in common (`transformers` and `transformer-lens`, `n_kv_head` and `num_heads`) mean different things.
    """
    limit = 1 if len(name) <= 5 else 2
    close = [candidate for candidate in candidates if abs(len(candidate) - len(name)) <= limit]
    best = min(((edits(name.lower(), candidate.lower()), candidate) for candidate in close), default=(limit + 1, None))
    return best[1] if best[0] <= limit else None


def check_choice(kind: str, name: str, choices: Collection[str]) -> None:
    """Check that `name` is one of the choices.

    Raises:
        LumiereError: It is not; the hint is the nearest choice, or all of them.
    """
    if name not in choices:
        guess = nearest(name, choices)
        hint = f"did you mean {guess}?" if guess else f"choose one of {', '.join(choices)}"
        raise LumiereError(f"there is no {kind} {name!r}", hint)


def edits(a: str, b: str) -> int:
    """Return the smallest number of insertions, deletions, substitutions and swaps of neighbors from `a` to `b`."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, character in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (character != other)))
            if i > 1 and j > 1 and character == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


MAX_LENGTH = 60
"""Characters of a value in a message."""


def quoted(value: Any) -> str:
    """Return `value` as short printable text; of a container only its type, because its text is unbounded."""
    match value:
        case int() if value.bit_length() > 1000:  # Python refuses to convert huge integers to text
            return "a number of hundreds of digits"
        case int() | float() | None:
            return shortened(str(value), MAX_LENGTH)
        case str() | Path():
            return f"'{shortened(printable(str(value)), MAX_LENGTH)}'"
        case _:
            return f"a {type(value).__name__}"


def given(options: Mapping[str, object]) -> list[str]:
    """Return the names of the options that the user set, also to 0."""
    return [name for name, value in options.items() if value is not None and value is not False and value != []]


def refuse_both(options: Mapping[str, object]) -> None:
    """Raise `LumiereError` if the user set two of the options."""
    if len(names := given(options)) > 1:
        raise LumiereError(f"{names[0]} and {names[1]} exclude each other", "use one of them")
