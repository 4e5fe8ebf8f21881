"""`lumiere inspect` alone: which analysis answers which question, and what its answer is worth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lumiere.cli.console import escape, stdout

NOTES = """
Below each question stands what the answer establishes, behind it what it takes
on a model of a million parameters, after loading. lumiere inspect NAME --help
has the options; -o FILE.svg draws it, -o FILE.csv and --json give the numbers."""


@dataclass(frozen=True)
class Entry:
    """A command of `lumiere inspect`, as it is listed.

    Attributes:
        command: its name is listed, and the beginning of its docstring, which is its question.
        establishes: what the answer shows, and what it does not.
        cost: seconds on the card's model after loading, on two cores, or a class.
    """

    command: Callable[..., None]
    establishes: str
    cost: str

    @property
    def question(self) -> str:
        first_line = (self.command.__doc__ or "").strip().partition("\n")[0]
        return first_line.partition("?")[0] + "?" if "?" in first_line else first_line.partition(",")[0]


def show_overview(entries: Sequence[Entry]) -> None:
    """Two lines an analysis: its command and its question, and what the answer establishes."""
    width = max(len(entry.command.__name__) for entry in entries) + 1
    room = max(len(entry.question) for entry in entries)
    for entry in entries:
        name, question = entry.command.__name__, escape(entry.question)
        stdout().print(f"[bold]{name:{width}}[/]{question:{room}} [dim]{entry.cost:>7}[/]")
        stdout().print(f"[dim]{'':{width}}{escape(entry.establishes)}[/]")
    stdout().print(NOTES)
