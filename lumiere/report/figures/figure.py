"""Figures as PNG, SVG or a self-contained HTML page, readable on light and dark backgrounds.

Functions `draw_...` raise a `LumiereError` if matplotlib is not installed.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.errors import LumiereError
from lumiere.files import DISK
from lumiere.programs import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

SUFFIXES = (".png", ".svg", ".html")
# Okabe and Ito 2008, "Color Universal Design", without black and yellow, which vanish on dark and light pages.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", ":", "-.")
FACTS_SIZE, CAPTION_SIZE = 9.5, 8.5
CHARACTERS_PER_INCH = 12
"""In facts and captions."""
INK = "#010203"
"""Placeholder for the text color of the page; no other element has this color."""
HOVER = "hover "
"""The id of an element begins with this if the rest of it is to be shown under the mouse, in an SVG."""
LABEL_WIDTH = 12
"""Maximum number of characters of a token beside a heat map."""


@dataclass(frozen=True)
class Picture:
    """A figure with its title and caption.

    Attributes:
        caption: what the figure shows, with its source.
        page: renders a complete HTML file from a title, for figures that have a page of their own.
    """

    figure: Figure
    title: str
    caption: str
    page: Callable[[str], str] | None = None


def check_picture(path: Path) -> None:
    """Check that a picture can be written to `path`.

    Raises:
        LumiereError: unknown suffix, the path is a directory, its directory does not exist, or matplotlib is not
            installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise LumiereError(f"{str(path)!r} is not a picture file", f"end the name in {', '.join(SUFFIXES)}")
    check_output(path)
    new_figure(1, 1)


def check_output(path: Path) -> None:
    """Check that a file can be written to `path`.

    Raises:
        LumiereError: the path is a directory, or its directory does not exist.
    """
    if path.is_dir():
        raise LumiereError(f"{str(path)!r} is a directory", "give the name of a file")
    if not path.parent.is_dir():
        raise LumiereError(f"directory {str(path.parent)!r} does not exist", "create it first, or choose another")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LumiereError("pictures need matplotlib, which is not installed", install_command("matplotlib")) from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def style_axes(axes: Axes) -> None:
    """Draw everything but the data in the text color, on a transparent background."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(alpha=0.2, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    for side in axes.spines.values():
        side.set_color(INK)
    axes.tick_params(which="both", colors=INK)
    style_text(axes.title, axes.xaxis.label, axes.yaxis.label)


def style_text(*texts: Text) -> None:
    """Use the text color, and show dollar signs as they are: tokens and corpora may contain them."""
    for text in texts:
        text.set_parse_math(False)
        text.set_color(INK)


def label_axes(axes: Axes, title: str | None = None, xlabel: str | None = None, ylabel: str | None = None) -> None:
    """Set the title and the names of the axes in a small font."""
    if title is not None:
        style_text(axes.set_title(title, fontsize=9, loc="left"))
    if xlabel is not None:
        style_text(axes.set_xlabel(xlabel, fontsize=8))
    if ylabel is not None:
        style_text(axes.set_ylabel(ylabel, fontsize=8))


def add_legend(axes: Axes, **options: Any) -> None:
    style_text(*axes.legend(frameon=False, **options).get_texts())


def fitted(label: str) -> str:
    """Cut a label to `LABEL_WIDTH` characters."""
    return label if len(label) <= LABEL_WIDTH else label[: LABEL_WIDTH - 1] + "…"


def rank_label(rank: float) -> str:
    """`1,204`; `1,023.5` for the mean rank of tied tokens."""
    return f"{rank:,.1f}".removesuffix(".0")


def save_picture(path: Path, picture: Picture, facts: str | None = None) -> None:
    """Write a picture atomically, in the format of the suffix.

    Args:
        facts: the model and the text shown; written into PNG and SVG together with title and caption, because these
            files are passed around without a page. None writes the bare figure.

    Raises:
        LumiereError: the file cannot be written.
    """
    suffix, figure = path.suffix.lower(), picture.figure
    if suffix == ".html" and picture.page is not None:
        data = picture.page(f"{picture.title}: {facts}").encode()
    elif suffix == ".html":
        from lumiere.report.rendering import render_html

        paragraphs = [*picture.caption.splitlines(), *([] if facts is None else [facts])]
        # Without a background, and with the text in the color of the page's text.
        svg = render_figure(figure, "svg", facecolor="none").decode().replace(INK, "currentColor")
        svg = svg[svg.index("<svg") :]
        data = render_html("figure.html.j2", title=picture.title, svg=svg, paragraphs=paragraphs).encode()
    else:
        if facts is not None:
            width = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
            facts = textwrap.fill(facts, int(width * CAPTION_SIZE / FACTS_SIZE))
            title = figure.suptitle(f"{picture.title}\n{facts}", fontsize=FACTS_SIZE)
            style_text(title, figure.supxlabel(textwrap.fill(picture.caption, width), fontsize=CAPTION_SIZE))
        data = render_figure(figure, suffix.removeprefix("."), facecolor="white")
    write_output(path, data)


def write_output(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        LumiereError: it cannot be written.
    """
    try:
        DISK.write(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise LumiereError(f"{str(path)!r} cannot be written: {reason}", "choose another path") from error


def render_figure(figure: Figure, form: str, facecolor: str) -> bytes:
    """Render as `png` or `svg`. Text stays text in an SVG; equal numbers give equal bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    if form == "png":
        escape_missing_glyphs(figure)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lumiere"}), warnings.catch_warnings():
        # The reader's fonts draw the text of an SVG; the font that measures it here may lack a character.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else None, facecolor=facecolor)
    return add_titles(buffer.getvalue()) if form == "svg" else buffer.getvalue()


def add_titles(svg: bytes) -> bytes:
    """Give each element whose id begins with `HOVER` the rest of the id as its title, which browsers show."""
    return re.sub(rb'<g id="' + HOVER.encode() + rb'([^"]*)">', rb"<g><title>\1</title>", svg)


def escape_missing_glyphs(figure: Figure) -> None:
    """Replace characters that the font lacks by escapes such as `\\u4eba`, instead of identical boxes."""
    from matplotlib.axis import Axis
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.text import Text

    known = get_font(findfont(FontProperties())).get_charmap()

    def escape(content: str) -> str:
        return "".join(c if ord(c) in known or c == "\n" else ascii(c)[1:-1] for c in content)

    for axis in figure.findobj(Axis):
        assert isinstance(axis, Axis)
        labels = [text.get_text() for text in axis.get_ticklabels()]
        if any(escape(label) != label for label in labels):
            # Tick labels are written again whenever they are drawn.
            axis.set_ticks(axis.get_ticklocs(), [escape(label) for label in labels])
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(escape(text.get_text()))
