"""HTML templates: autoescaped values, data through `tojson`, and the page's own scripts and styles."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_html(template: str, **values: Any) -> str:
    """Render a file of `templates/`. Every value is escaped where it is inserted."""
    return environment().get_template(template).render(values)


def new_environment(*, autoescape: bool, **options: Any) -> Environment:
    """Templates of the folder `templates/`, in which an unknown name is an error."""
    return Environment(
        loader=PackageLoader("lumiere.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


@cache
def environment() -> Environment:
    """The environment of all HTML pages."""
    found = new_environment(autoescape=True)
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    found.filters |= {"grouped": grouped, "share": share, "signed": signed, "plural": plural}
    found.globals["asset"] = asset
    return found


def asset(name: str) -> str:
    """The text of a script or style in `page/`; templates insert it with `|safe`."""
    return (files("lumiere.report") / "page" / name).read_text(encoding="utf-8")


def grouped(count: int) -> str:
    """1234 as `1,234`."""
    return f"{count:,}"


def plural(count: int, noun: str) -> str:
    """2 and `layer` as `2 layers`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def share(value: float) -> str:
    """0.5 as `50.0%`, NaN as a dash."""
    return "–" if math.isnan(value) else f"{value:.1%}"


def signed(value: float, decimals: int) -> str:
    """With a sign and a typographic minus; NaN as a dash."""
    return "–" if math.isnan(value) else f"{value:+.{decimals}f}".replace("-", "−")


@dataclass(frozen=True)
class Scale:
    """Maps numbers from `low` to `high` linearly to the SVG coordinates `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: Any) -> Any:
        """Return the coordinate of a number, or those of an array."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def svg_path(points: Iterable[tuple[float, float]]) -> str:
    """The `d` of an SVG path through the points, interrupted where a coordinate is NaN."""
    pieces, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            pieces.append(f"{pen}{x:.2f} {y:.2f}")
        pen = "L" if math.isfinite(y) else "M"
    return "".join(pieces)
