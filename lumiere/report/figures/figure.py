"""Pictures of any kind: PNG, SVG, or one HTML file that needs nothing else; readable on a light and on a dark page."""

from __future__ import annotations

import html
import io
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.errors import LumiereError
from lumiere.files import write_atomically
from lumiere.programs import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text


SUFFIXES = (".png", ".svg", ".html")
# Okabe and Ito 2008, "Color Universal Design", without black and yellow, which vanish on a dark and on a light page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", ":", "-.")  # the next one for each round of the colours
FACTS_SIZE, CAPTION_SIZE = 9.5, 8.5
CHARACTERS_PER_INCH = 12  # of facts and captions
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
{caption}
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """A figure and what has to be said with it.

    Attributes:
        caption: what is seen, and whose idea it is.
        page: makes the whole HTML file of a title, where that is more than the figure between its words.
    """

    figure: Figure
    title: str
    caption: str
    page: Callable[[str], str] | None = None


def check_picture(path: Path) -> None:
    """Refuses a path that no picture can be written to.

    Raises:
        LumiereError: its suffix is none of `SUFFIXES`, it is a folder, or its folder is not there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise LumiereError(f"{str(path)!r} is no picture", f"its name has to end in {', '.join(SUFFIXES)}")
    check_place(path)


def check_place(path: Path) -> None:
    """Refuses a path that no file can be written to.

    Raises:
        LumiereError: it is a folder, or its folder is not there.
    """
    if path.is_dir():
        raise LumiereError(f"{str(path)!r} is a folder", "give the name of a file")
    if not path.parent.is_dir():
        raise LumiereError(f"there is no folder {str(path.parent)!r}", "make it first, or choose another")


def check_drawing() -> None:
    """Refuses to draw where that cannot be.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    new_figure(1, 1)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches.

    Raises:
        LumiereError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LumiereError(
            "a picture needs matplotlib, which is not installed", install_command("matplotlib")
        ) from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def style_axes(axes: Axes) -> None:
    """All that is no data in the colour of the text, over nothing."""
    axes.set_facecolor("none")
    axes.grid(alpha=0.2, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    for side in axes.spines.values():
        side.set_color(INK)
    axes.tick_params(which="both", colors=INK)
    style_text(axes.title, axes.xaxis.label, axes.yaxis.label)


def style_text(*texts: Text) -> None:
    """Text as it is, in the page's colour: a corpus may have dollars in its name."""
    for text in texts:
        text.set_parse_math(False)
        text.set_color(INK)


def save_picture(path: Path, picture: Picture, facts: str) -> None:
    """Writes the picture with its words atomically, in the format of the path's suffix.

    Args:
        facts: what is drawn: the model, and the text that it was given.

    Raises:
        LumiereError: the file cannot be written.
    """
    if path.suffix.lower() != ".html":
        write_words(picture, facts)
        save_figure(path, picture.figure, picture.title, picture.caption)
    elif picture.page is not None:
        write_picture(path, picture.page(f"{picture.title}: {facts}").encode())
    else:
        save_figure(path, picture.figure, picture.title, f"{picture.caption}\n{facts}")


def write_words(picture: Picture, facts: str) -> None:
    """Title and facts above the figure, the caption below it: a picture travels without its page."""
    figure = picture.figure
    width = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    facts = textwrap.fill(facts, int(width * CAPTION_SIZE / FACTS_SIZE))
    title = figure.suptitle(f"{picture.title}\n{facts}", fontsize=FACTS_SIZE)
    style_text(title, figure.supxlabel(textwrap.fill(picture.caption, width), fontsize=CAPTION_SIZE))


def save_figure(path: Path, figure: Figure, title: str, caption: str) -> None:
    """Writes the figure atomically, in the format of the path's suffix.

    Args:
        title, caption: of a page.

    Raises:
        LumiereError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix == ".html":
        data = page(title, inline_svg(figure), caption).encode()
    else:
        data = rendered(figure, suffix.removeprefix("."), facecolor="white")
    write_picture(path, data)


def write_picture(path: Path, data: bytes) -> None:
    """Writes a file whole.

    Raises:
        LumiereError: it cannot be written.
    """
    try:
        write_atomically(path, data)
    except OSError as error:
        raise LumiereError(
            f"{str(path)!r} cannot be written: {error.strerror or error}", "choose another place"
        ) from error


def rendered(figure: Figure, form: str, facecolor: str) -> bytes:
    """The figure as PNG or SVG. Text stays text in an SVG, and the same numbers give the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None
    if form == "png":
        spell_missing_characters(figure)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lumiere"}), warnings.catch_warnings():
        # In an SVG the reader's fonts draw the text; the one that only measures it here may lack a character.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format=form, metadata=metadata, facecolor=facecolor)
    return buffer.getvalue()


def spell_missing_characters(figure: Figure) -> None:
    """Writes characters that the font does not have as `\\u4eba`, rather than all as the same box."""
    from matplotlib.axis import Axis
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.text import Text

    known = get_font(findfont(FontProperties())).get_charmap()

    def spelled(content: str) -> str:
        return "".join(c if ord(c) in known or c == "\n" else ascii(c)[1:-1] for c in content)

    for axis in figure.findobj(Axis):
        assert isinstance(axis, Axis)
        # The labels of ticks are written anew whenever they are drawn.
        labels = [text.get_text() for text in axis.get_ticklabels()]
        if any(spelled(label) != label for label in labels):
            axis.set_ticks(axis.get_ticklocs(), [spelled(label) for label in labels])
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(spelled(text.get_text()))


def inline_svg(figure: Figure) -> str:
    """The figure as an element of a page, without a background, its text in the colour of the page's."""
    text = rendered(figure, "svg", facecolor="none").decode()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def page(title: str, svg: str, caption: str) -> str:
    """One self-contained HTML file; each line of the caption is a paragraph."""
    paragraphs = "\n".join(f"<p>{html.escape(line)}</p>" for line in caption.splitlines())
    return PAGE.format(title=html.escape(title), svg=svg, caption=paragraphs)


LABEL_WIDTH = 12


def fitted(label: str) -> str:
    """The label, its end left out where it is too long."""
    return label if len(label) <= LABEL_WIDTH else label[: LABEL_WIDTH - 1] + "…"


def rank_label(rank: float) -> str:
    """`1,204`; `1,023.5` where tied tokens share their places."""
    return f"{rank:,.1f}".removesuffix(".0")
