"""Pictures inside another page, such as a notebook: HTML whose styles and ids reach nothing else there."""

import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from itertools import count
from typing import Any

from lumiere.errors import LumiereError
from lumiere.interpret.result import Receipt, Result
from lumiere.report.figures.figure import INK, Picture, render_figure
from lumiere.report.rendering import plural, render_html
from lumiere.report.results import facts_line

STYLE = re.compile(r"<style[^>]*>.*?</style>", re.DOTALL)
"""Matplotlib's style names every element of the page."""
REFERENCE = re.compile(r'(\bid="|url\(#|href="#)')
COUNTER = count()


def result_fragment(
    result: Result, provenance: Mapping[str, Any], notes: Sequence[str], draw: Callable[[], Picture]
) -> str:
    """Return a result as HTML: its picture, what was read, and its receipts."""
    return fragment(provenance["analysis"], facts_line(provenance), draw, notes, result.receipts)


def fragment(
    name: str,
    facts: str,
    draw: Callable[[], Picture],
    notes: Sequence[str] = (),
    receipts: Sequence[Receipt] = (),
) -> str:
    """Return a picture as HTML, with its text in the color of the page's text. Without matplotlib, a note says so.

    Args:
        name: Stands in place of the picture's title if there is no picture.
        facts: The model and the text shown.
    """
    try:
        picture = draw()
    except LumiereError as error:
        title, svg, caption, notes = name, None, "", [*notes, str(error)]
    else:
        title, svg, caption = picture.title, inline_svg(picture), picture.caption
    failed, checks = sum(not receipt.holds for receipt in receipts), plural(len(receipts), "check")
    verdict = f"{failed} of {checks} FAILED" if failed else f"{checks} passed"
    return render_html(
        "fragment.html.j2",
        title=title,
        facts=facts,
        notes=notes,
        receipts=receipts,
        verdict=verdict,
        svg=svg,
        caption=caption,
    )


def inline_svg(picture: Picture) -> str:
    """Return a picture as an SVG element of a page that may hold several: no style of its own, and ids used once."""
    svg = render_figure(picture.figure, "svg", facecolor="none").decode().replace(INK, "currentColor")
    svg = STYLE.sub("", svg[svg.index("<svg") :])
    prefix = f"lumiere-{next(COUNTER)}-{sha256(svg.encode()).hexdigest()[:8]}-"
    look = "max-width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt"
    return REFERENCE.sub(rf"\g<1>{prefix}", svg).replace("<svg ", f'<svg style="{look}" ', 1)


def framed(page: str) -> str:
    """Return a whole page as a frame, which keeps its styles and scripts to itself."""
    return render_html("frame.html.j2", page=page)


def text_fragment(prompt: str, pieces: Sequence[tuple[str, float | None]]) -> str:
    """Return a text as HTML, its pieces shaded by their probabilities; the less probable, the stronger."""
    return render_html("text.html.j2", prompt=prompt, pieces=pieces)
