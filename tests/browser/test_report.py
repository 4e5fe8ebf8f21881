"""The report in a browser: each section by mouse and keyboard, with the numbers of the analyses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumiere.interpret.attention import attention_patterns
from lumiere.interpret.logit_lens import logit_lens
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run

pytestmark = pytest.mark.slow

SECTIONS = (
    *("overview", "reading", "explorer", "attention", "heads", "lens"),
    *("attribution", "neurons", "map", "receipts"),
)


def percent(share: float) -> str:
    """Format a share as the page does."""
    thousandths = round(float(share) * 1000)
    if thousandths == 0:
        return "<0.1%"
    return f"{thousandths / 10:.1f}%" if thousandths < 100 else f"{int(thousandths / 10 + 0.5)}%"


def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_text_contents()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_window(opened: Any, width: int, scheme: str, tmp_path: Path) -> None:
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for section in SECTIONS:
        page.locator(f"#{section}").scroll_into_view_if_needed()
        assert page.locator(f"#{section}").bounding_box()["height"] > 100
    page.screenshot(path=tmp_path / f"report-{width}-{scheme}.png", full_page=True)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(",")))
    assert (brightness > 600) == (scheme == "light")


def test_a_word_by_mouse_and_by_keyboard(opened: Any, tokens: list[int], trained_run: Run, model: Transformer) -> None:
    page, label = opened(), trained_run.load_tokenizer().label
    assert texts(page, "#tokens button") == [label(token) for token in tokens]
    page.locator("#tokens button").nth(3).click()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('#tokens button')].indexOf(document.activeElement)") == 4
    pressed = page.locator("#tokens button[aria-pressed=true]")
    assert (pressed.count(), pressed.text_content()) == (1, label(tokens[4]))

    patterns = attention_patterns(model, tokens).patterns[:, :, 4, :5]
    heads = page.locator("#looks button")
    for number, row in enumerate(patterns.reshape(-1, 5)):
        source = int(np.rint(row * 1000).argmax())
        expected = f"L{number // 2}H{number % 2} {percent(row[source])}{label(tokens[source])}"
        assert heads.nth(number).text_content() == expected

    lens = logit_lens(model, tokens, top_k=3)
    guesses = texts(page, "#says .guesses > div")
    for line, stage in enumerate([2, 1, 0]):
        assert guesses[4 * line] == ["embed", "L0", "L1"][stage]
        for rank in range(3):
            shown = label(lens.top_tokens[stage, 4, rank]) + percent(lens.top_probabilities[stage, 4, rank])
            assert guesses[4 * line + 1 + rank] == shown


def test_a_head_opens_and_is_read_out(opened: Any, tokens: list[int], model: Transformer) -> None:
    page = opened()
    pattern = attention_patterns(model, tokens).patterns[1, 0]
    page.locator("#thumbnails button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    if page.locator("#thumbnails button").nth(2).get_attribute("aria-pressed") == "false":
        page.keyboard.press("Enter")
    assert page.locator("#thumbnails button").nth(2).get_attribute("aria-pressed") == "true"
    canvas = page.locator("#large canvas")
    canvas.focus()
    for _ in range(len(tokens)):
        page.keyboard.press("ArrowLeft")
    last = len(tokens) - 2
    caption = page.locator("#large figcaption").text_content()
    assert caption.startswith("L1H0: ")
    assert f"(position {last}) attends {percent(pattern[last, 0])} to" in caption
    page.keyboard.press("ArrowUp")
    assert f"(position {last - 1}) attends {percent(pattern[last - 1, 0])}" in page.locator("#large").text_content()
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] - 8, "y": box["height"] - 8})
    assert f"(position {last + 1}) attends" in page.locator("#large figcaption").text_content()
    painted = page.evaluate(
        "[...document.querySelectorAll('#thumbnails canvas')].map((canvas) => new Set(canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height).data).size > 10)"
    )
    assert painted == [True] * 4


def test_the_lens_follows_and_leads(opened: Any, tokens: list[int], trained_run: Run) -> None:
    page, label = opened(360), trained_run.load_tokenizer().label
    lens = logit_lens(trained_run.load_model(), tokens)
    shown = texts(page, "#lens-table tbody tr:nth-child(2) td")
    assert shown == [label(token) for token in lens.top_tokens[-1, :, 0]]
    page.locator("#lens-table thead button").first.click()
    page.keyboard.press("End")
    assert page.locator("#tokens button").last.get_attribute("aria-pressed") == "true"
    assert page.locator("#lens-table").evaluate("(box) => box.scrollLeft + box.clientWidth >= box.scrollWidth - 60")


def test_another_text_whose_markup_is_text(opened: Any) -> None:
    page = opened()
    page.locator("#text").select_option(index=1)
    assert "<" in "".join(texts(page, "#tokens button"))
    assert page.locator("main b").count() == 0


def test_neurons_and_map(opened: Any) -> None:
    page = opened()
    title = page.locator("#neuron h3")
    first = title.text_content()
    page.get_by_role("button", name="Next neuron").click()
    assert title.text_content() != first
    page.get_by_role("button", name="Previous neuron").click()
    assert title.text_content() == first
    page.get_by_role("button", name="Layer 1", exact=True).click()
    assert title.text_content().endswith("of layer 1")
    assert page.locator("#neuron .example").count() > 0
    read = page.locator("#map-read")
    before = read.text_content()
    page.locator("#embedding svg").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.locator("#embedding circle.here").count() == 1
    page.locator("#embedding svg").hover(position={"x": 200, "y": 150})
    assert read.text_content() != before or page.locator("#embedding circle").count() < 3


def test_static_parts_without_scripts(opened: Any) -> None:
    page = opened(scripts=False)
    assert page.locator("#explorer").is_hidden()
    assert "Scripts are off" in page.locator("body").inner_text()
    assert page.locator("#heads tbody tr").count() == 5  # four heads and the uniform one
    assert page.locator("#verdict").inner_text().startswith("All ")


def test_printed(opened: Any) -> None:
    page = opened(794, "dark")
    # From a copy: a canvas that is read often logs a warning.
    corner = (
        "(() => { const copy = document.createElement('canvas').getContext('2d');"
        " copy.drawImage(document.querySelector('#thumbnails canvas'), 0, 0);"
        " return copy.getImageData(2, 0, 1, 1).data[0]; })()"
    )
    assert page.evaluate(corner) < 60
    page.emulate_media(media="print", color_scheme="dark")
    for _ in range(200):  # the page's policy blocks `wait_for_function`
        if page.evaluate(corner) == 255:
            break
        page.wait_for_timeout(20)
    assert page.evaluate(corner) == 255, "painted again, for paper"
    assert page.evaluate("document.documentElement.scrollWidth") == 794
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    assert page.pdf()[:4] == b"%PDF"


REACHES = """() => [...document.querySelectorAll("table")].flatMap((table) => [...table.rows].flatMap((row) =>
  [...row.cells].flatMap((cell) => {
    const box = cell.getBoundingClientRect();
    const content = document.createRange();
    const parts = [...cell.querySelectorAll("*")];
    // Text of the cell itself; text that is longer than its own element is cut there.
    for (const node of cell.childNodes) {
      content.selectNode(node);
      if (node.nodeType === Node.TEXT_NODE && node.textContent) parts.push(content.cloneRange());
    }
    return parts.map((part) => {
      const own = part.getBoundingClientRect();
      const reach = Math.max(box.left - own.left, own.right - box.right, box.top - own.top, own.bottom - box.bottom);
      return { where: `${table.closest("section").id}: ${cell.textContent}`, reach };
    });
  })))"""


@pytest.mark.parametrize("width", [390, 1280])
def test_no_cell_of_a_table_reaches_into_the_next(opened: Any, width: int) -> None:
    page = opened(width)
    for details in page.locator("details").all():
        details.evaluate("(details) => { details.open = true }")
    reaches = page.evaluate(REACHES)
    assert {reach["where"].split(":")[0] for reach in reaches} >= {"overview", "heads", "lens", "receipts"}
    assert [reach for reach in reaches if reach["reach"] > 0.5] == []
