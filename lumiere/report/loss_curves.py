"""Loss curves as a picture: PNG, SVG, or one HTML file that needs nothing else."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.errors import LumiereError, nearest
from lumiere.persistence.atomic import write_atomically
from lumiere.persistence.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
AXES: Mapping[str, str] = {"step": "step", "tokens": "tokens", "time": "seconds of training"}
# Okabe and Ito 2008, "Color Universal Design", without black and yellow, which vanish on a dark and on a light page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", ":", "-.")  # the next one for each round of the colours
INK = "#010203"  # stands for the page's own text colour, and is no other's
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ color: #111; background: #fff; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
svg {{ width: 100%; height: auto; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #eee; background: #111; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
{svg}
<p>Losses in nats a token. Thin: training, one batch a point. Bold with dots: validation.</p>
</body>
</html>
"""


@dataclass(frozen=True)
class LossCurves:
    """The losses of one run, and what they are called: the run and the corpus that they are over."""

    label: str
    history: History


def check_picture(path: Path) -> None:
    """Refuses a path that no picture can be written to.

    Raises:
        LumiereError: its suffix is none of `SUFFIXES`, it is a folder, or its folder is not there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise LumiereError(f"{str(path)!r} is no picture", f"its name has to end in {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise LumiereError(f"{str(path)!r} is a folder", "give the name of a file")
    if not path.parent.is_dir():
        raise LumiereError(f"there is no folder {str(path.parent)!r}", "make it first, or choose another")


def check_axis(axis: str) -> None:
    """Refuses an axis that is none of `AXES`."""
    if axis not in AXES:
        guess = nearest(axis, AXES)
        raise LumiereError(
            f"there is no axis {axis!a}", f"did you mean {guess}?" if guess else f"one of {', '.join(AXES)}"
        )


def save_loss_curves(path: Path, curves: Sequence[LossCurves], axis: str = "step") -> None:
    """Draws training and validation losses over `axis` and writes the picture atomically, by the path's suffix.

    Raises:
        LumiereError: the path or the axis will not do, matplotlib is not installed, or the file cannot be written.
    """
    check_picture(path)
    check_axis(axis)
    suffix = path.suffix.lower()
    figure = draw(curves, axis)
    if suffix == ".html":
        data = page("Loss curves", inline_svg(figure)).encode()
    else:
        data = rendered(figure, suffix.removeprefix("."), facecolor="white")
    try:
        write_atomically(path, data)
    except OSError as error:
        raise LumiereError(
            f"{str(path)!r} cannot be written: {error.strerror or error}", "choose another place"
        ) from error


def draw(curves: Sequence[LossCurves], axis: str) -> Figure:
    """The figure: for each run a thin training curve, and a bold validation curve with dots."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LumiereError(
            "a picture needs matplotlib, which is not installed", "pip install 'lumiere[plot]'"
        ) from None
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(facecolor="none")
    for index, curve in enumerate(curves):
        draw_curves(
            axes, curve, axis, COLOURS[index % len(COLOURS)], LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        )
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("loss (nats a token)")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.grid(alpha=0.2, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(loc="upper right", frameon=False).get_texts():
        text.set_parse_math(False)  # a corpus may have dollars in its name
        text.set_color(INK)
    for side in axes.spines.values():
        side.set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure


def draw_curves(axes: Axes, curve: LossCurves, axis: str, colour: str, style: str) -> None:
    training, validation = curve.history.training, curve.history.validation
    axes.plot(
        [getattr(point, axis) for point in training],
        [point.loss for point in training],
        color=colour,
        linestyle=style,
        linewidth=1.0,
        alpha=0.75,
        label=f"{curve.label}, training",
    )
    axes.plot(
        [getattr(point, axis) for point in validation],
        [point.loss for point in validation],
        color=colour,
        linestyle=style,
        linewidth=1.8,
        marker="o",
        markersize=3.5,
        label=f"{curve.label}, validation",
    )


def rendered(figure: Figure, form: str, facecolor: str) -> bytes:
    """The figure as PNG or SVG. Text stays text in an SVG, and the same losses give the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lumiere"}):
        figure.savefig(buffer, format=form, metadata=metadata, facecolor=facecolor)
    return buffer.getvalue()


def inline_svg(figure: Figure) -> str:
    """The figure as an element of a page, without a background, its text in the colour of the page's."""
    text = rendered(figure, "svg", facecolor="none").decode()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def page(title: str, svg: str) -> str:
    """One self-contained HTML file."""
    return PAGE.format(title=html.escape(title), svg=svg)
