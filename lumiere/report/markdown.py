"""Markdown that says what it is given and nothing else: text from files cannot end a table, a fence or a heading."""

import re
from collections.abc import Iterable, Sequence

LONGEST = 200
"""Characters of a value that are shown: a card is to be read."""


def code(text: str) -> str:
    """`text` as a code span, in which nothing is markup (CommonMark 0.31, section 6.1)."""
    text = printable(text)
    fence = "`" * (longest_run(text) + 1)
    # A space at each side is taken off again; without it a backtick at an end would belong to the fence.
    padding = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text.strip() else ""
    return f"{fence}{padding}{text or ' '}{padding}{fence}"


def fenced(text: str, language: str = "") -> str:
    """`text`, which may have many lines, as a code block."""
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already. A bar would end one, in a code span too (GFM 0.29, section 4.10)."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def bullets(items: Iterable[str]) -> str:
    """A list, one item a line."""
    return "\n".join(f"- {item}" for item in items)


def longest_run(text: str) -> int:
    """How many backticks stand side by side at most."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def printable(text: str) -> str:
    """`text` in one short line, with control characters and line ends made visible."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
