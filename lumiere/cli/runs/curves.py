"""The loss curves of runs in a terminal, as `plot` and `watch` show them."""

import shutil
import string
from collections.abc import Callable, Sequence

import typer

from lumiere.cli.chart import Curve, chart
from lumiere.cli.console import duration
from lumiere.cli.runs.cells import is_coloured
from lumiere.cli.streams import is_unicode
from lumiere.persistence.metrics import History

# The colours of `report.loss_curves.COLOURS`, as near as the 256 of a terminal come.
COLOURS = (32, 166, 36, 175, 214, 117)
CHART_HEIGHT = 18


def draw(histories: Sequence[History], axis: str, width: int, height: int = CHART_HEIGHT) -> list[str]:
    """A line each for training, and marks for validation; in colours where stdout has them, else in letters."""
    dotted = has_dots()
    curves = []
    for index, history in enumerate(histories):
        training = [(getattr(point, axis), point.loss) for point in history.training]
        letter = string.ascii_lowercase[index % 26]
        curves.append(Curve(training, letter, index % len(COLOURS)))
    for index, history in enumerate(histories):
        validation = [(getattr(point, axis), point.loss) for point in history.validation]
        letter = string.ascii_uppercase[index % 26]
        curves.append(Curve(validation, letter, index % len(COLOURS), is_marked=True))
    return chart(curves, width, height, X_FORMATS[axis], paint if dotted else None)


def legend(labels: Sequence[str]) -> list[str]:
    """What draws which run."""
    if has_dots():
        return [f"{paint('⠉⠉', index % len(COLOURS))} training  {paint('●', index % len(COLOURS))} validation  {label}"
                for index, label in enumerate(labels)]  # fmt: skip
    return [
        f"{string.ascii_lowercase[index % 26]} training  {string.ascii_uppercase[index % 26]} validation  {label}"
        for index, label in enumerate(labels)
    ]


def has_dots() -> bool:
    """Whether stdout shows colours and braille."""
    return is_unicode() and is_coloured()


def paint(text: str, colour: int) -> str:
    return typer.style(text, fg=COLOURS[colour])


def terminal_width() -> int:
    return shutil.get_terminal_size().columns


X_FORMATS: dict[str, Callable[[float], str]] = {
    "step": lambda x: f"step {x:,.0f}",
    "tokens": lambda x: f"{x:,.0f} tokens",
    "time": duration,
}
