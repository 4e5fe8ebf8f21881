"""Options that mean the same in every analysis."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from lumiere.cli.options import complete_run
from lumiere.errors import LumiereError

PAIR_HELP = "A run and, after an @, its checkpoint, such as latest@best, 3ka5@500; without one, as --checkpoint says."
FirstModel = Annotated[str, typer.Argument(metavar="A", help=PAIR_HELP, autocompletion=complete_run)]
SecondModel = Annotated[str, typer.Argument(metavar="B", help="The same, or another.", autocompletion=complete_run)]
Prompt = Annotated[
    Optional[str],  # noqa: UP045 (Typer reads this form)
    typer.Option("--prompt", "-p", metavar="TEXT", help="The text to look at."),
]
TextFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--file", metavar="FILE", help="A UTF-8 text file to look at: as much of its start as fits."),
]
Window = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--val", metavar="N", min=0, help="A window of the validation split, counted from 0."),
]
Random = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--random", metavar="S", min=1, help="S random tokens, twice in a row."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of all that is drawn at random.")]
Layers = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--layer", "-l", metavar="LIST", help="Blocks, counted from 0, such as 2 or 0,2-3. \\[default: all]"),
]
Heads = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--head", metavar="LIST", help="Heads, counted from 0, such as 1 or 0-2. \\[default: all]"),
]
Positions = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--pos", metavar="LIST", help="Positions of the text, such as 5 or 0,8-11; -1 is the last."),
]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", min=1, help="How many of each list to show.")]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the numbers to a .json, .csv or .npz file, or the picture to a .html, .svg or .png one.",
    ),
]
Verify = Annotated[bool, typer.Option("--verify", help="Compute it again in float64 and compare.")]


def parse_indices(text: str | None, count: int, name: str) -> list[int]:
    """The numbers that a list such as `0,2-3` stands for, in its order and each once; all of them if it is None.

    Negative numbers count from the end: -1 is the last.

    Args:
        count: how many there are; indices are less than this.
        name: what is counted, for the error: layer, head or position.

    Raises:
        LumiereError: if it is no such list, or there is no such index.
    """
    if text is None:
        return list(range(count))
    found: list[int] = []
    for part in text.split(","):
        first, last = range_ends(part.strip(), name)
        for index in (first, last):
            if not -count <= index < count:
                raise LumiereError(f"there is no {name} {index}", f"the {name}s are {spelled(range(count))}")
        first, last = first % count, last % count
        if first > last:
            raise LumiereError(f"the {name}s {part.strip()} run backwards", "write the smaller number first")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def range_ends(part: str, name: str) -> tuple[int, int]:
    """`3` as (3, 3), `1-3` as (1, 3), `-1` as (-1, -1).

    Raises:
        LumiereError: if it is none of these.
    """
    head, dash, tail = part[1:].partition("-")
    try:
        first = int(part[:1] + head)
        return first, int(tail) if dash else first
    except ValueError:
        raise LumiereError(f"{part!r} is no {name}", "write numbers and ranges, such as 0,2-3") from None


def spelled(indices: Sequence[int]) -> str:
    """`0 to 3`, or `0` where there is only one."""
    return str(indices[0]) if len(indices) == 1 else f"{indices[0]} to {indices[-1]}"
