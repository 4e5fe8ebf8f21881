"""What every analysis of a run takes: its text, and how to draw and verify."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from lumiere.api.target import InspectTarget

if TYPE_CHECKING:
    from lumiere.api.runs import OpenedRun

Prompt = str | Sequence[int] | None
"""A text, or token ids, which get no start token; None reads the validation split, or what the analysis says."""


class Options(TypedDict, total=False):
    """What every analysis of a text takes; `file`, `val` and `random` are texts in place of a prompt.

    Attributes:
        file: A UTF-8 text file: as much of its start as fits.
        val: The number of a window of the validation split.
        random: This many random tokens, repeated once.
        seed: Of everything drawn at random. Default: 0.
        verify: Whether to compute the result again in float64 and compare.
    """

    file: str | Path | None
    val: int | None
    random: int | None
    seed: int
    verify: bool


class RunAnalyses:
    """The analyses of a run's model."""

    def __init__(self, run: "OpenedRun") -> None:
        self._run = run

    def _target(
        self,
        prompt: Prompt = None,
        *,
        file: str | Path | None = None,
        val: int | None = None,
        random: int | None = None,
        seed: int = 0,
        verify: bool = False,
        run: "OpenedRun | None" = None,
        other: "OpenedRun | None" = None,
    ) -> InspectTarget:
        run, text = run or self._run, {"prompt": prompt, "file": file, "val": val, "random": random}
        return InspectTarget(run.opened, text, seed, verify, other and other.opened, run.notify)
