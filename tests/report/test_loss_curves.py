"""Pictures of losses: three formats, self-contained, readable on any page, and written whole."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lumiere.errors import LumiereError
from lumiere.persistence.metrics import History, Point
from lumiere.report.figures.curves import LossCurves, draw_loss_curves, save_loss_curves
from lumiere.report.figures.figure import COLOURS

HISTORY = History(
    training=tuple(Point(step, 100 * step, step / 4, 8 - step) for step in range(1, 5)),
    validation=(Point(2, 200, 0.5, 5.5), Point(4, 400, 1.0, 3.5)),
)
CURVES = [LossCurves("aaaaaaaa on $x$ <b>&amp;</b>", HISTORY), LossCurves("bbbbbbbb on stories", HISTORY)]


@pytest.mark.parametrize(
    ("axis", "xs", "name"),
    [
        ("step", [1, 2, 3, 4], "step"),
        ("tokens", [100, 200, 300, 400], "tokens"),
        ("time", [0.25, 0.5, 0.75, 1.0], "seconds of training"),
    ],
)
def test_the_figure_holds_the_numbers(axis: str, xs: list[float], name: str) -> None:
    (axes,) = draw_loss_curves(CURVES, axis).axes
    assert axes.get_xlabel() == name
    training, validation, *others = axes.get_lines()
    assert len(others) == 2
    assert list(training.get_xdata()) == xs  # pyright: ignore
    assert list(training.get_ydata()) == [7, 6, 5, 4]  # pyright: ignore
    assert list(validation.get_xdata()) == [xs[1], xs[3]]  # pyright: ignore
    assert list(validation.get_ydata()) == [5.5, 3.5]  # pyright: ignore


def test_many_runs_never_look_the_same() -> None:
    (axes,) = draw_loss_curves([LossCurves(str(i), HISTORY) for i in range(20)], "step").axes
    looks = {(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in axes.get_lines()}
    assert len(looks) == 40
    assert {str(color) for color, _, _ in looks} == set(COLOURS)


def test_each_suffix_gives_its_format(tmp_path: Path) -> None:
    for name in ("loss.png", "loss.SVG", "loss.html"):
        save_loss_curves(tmp_path / name, CURVES)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert ElementTree.parse(tmp_path / "loss.SVG").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert (tmp_path / "loss.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.SVG", "loss.html", "loss.png"]


def test_the_page_needs_nothing_else_and_takes_the_colours_of_the_reader(tmp_path: Path) -> None:
    save_loss_curves(tmp_path / "loss.html", CURVES)
    text = (tmp_path / "loss.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", text)
    assert not re.search(r'(?:href|src)="(?!#)', text)
    assert "prefers-color-scheme: dark" in text
    assert "aaaaaaaa on $x$ &lt;b&gt;&amp;amp;&lt;/b&gt;, training" in text
    colours = {colour.upper() for colour in re.findall(r"#[0-9a-fA-F]{6}\b", text)}
    assert colours == set(COLOURS[:2]), "all else has the colour of the text, and there is no background"
    assert "currentColor" in text


def test_the_same_losses_give_the_same_bytes_and_replace_what_is_there(tmp_path: Path) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    second.write_text("old")
    save_loss_curves(first, CURVES)
    save_loss_curves(second, CURVES)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("name", "axis", "message", "hint"),
    [
        ("loss.gif", "step", "'loss.gif' is no picture", "its name has to end in .png, .svg, .html"),
        ("loss", "step", "'loss' is no picture", "its name has to end in .png, .svg, .html"),
        ("folder.png", "step", "'folder.png' is a folder", "give the name of a file"),
        ("none/loss.png", "step", "there is no folder 'none'", "make it first, or choose another"),
        ("loss.png", "tokns", "there is no axis 'tokns'", "did you mean tokens?"),
        ("loss.png", "x", "there is no axis 'x'", "one of step, tokens, time"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name: str, axis: str, message: str, hint: str) -> None:
    Path("folder.png").mkdir()
    with pytest.raises(LumiereError) as caught:
        save_loss_curves(Path(name), CURVES, axis)
    assert (caught.value.message, caught.value.hint) == (message, hint)
    assert [path.name for path in Path.cwd().iterdir()] == ["folder.png"]


def test_without_matplotlib_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LumiereError) as caught:
        save_loss_curves(Path("loss.png"), CURVES)
    assert caught.value.hint == "pip install matplotlib"
    assert not Path("loss.png").exists()
