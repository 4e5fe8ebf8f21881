"""The report compared with a plain forward pass, by keyboard alone, on a phone, and with hostile tokens."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.utils import htmlsafe_json_dumps

from lumiere.components.hooks import run_with_cache
from lumiere.data.dataset import TokenizedCorpus
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run

pytestmark = pytest.mark.slow

HARM = "</script><script>window.harm=1</script><img src=x onerror=window.harm=1>\u2028\u2029 ${harm} {{title}} &lt;"
COLORS = "['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])"


def percents(text: str) -> list[float]:
    """All percentages of a text; "<0.1%" is 0."""
    return [0.0 if below else float(number) for below, number in re.findall(r"(<?)(\d+(?:\.\d+)?)%", text)]


def is_shown(percent: float, share: float) -> bool:
    """Whether a share is printed correctly: rounded to thousandths, and to hundredths from 10 %."""
    return abs(percent - share * 100) <= (0.56 if percent >= 10 else 0.11)


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_the_numbers_are_those_of_a_plain_forward_pass(
    opened: Any, model: Transformer, tokens: list[int], trained_run: Run, tiny_corpus: TokenizedCorpus
) -> None:
    page, label = opened(), trained_run.load_tokenizer().label
    occurring = torch.from_numpy(tiny_corpus.splits["train"].ids.astype("int64")).unique()
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.num_layers)]
    with torch.inference_mode():
        output, cache = run_with_cache(model, torch.tensor([tokens]), names)
    logits_TV = output.logits[0].double()
    probabilities_TV = logits_TV.softmax(-1)
    if page.locator("#looks button").first.get_attribute("aria-pressed") != "true":
        page.locator("#looks button").first.click()
    for position in range(len(tokens)):
        page.locator("#tokens button").nth(position).click()
        share, best = probabilities_TV[position].max(-1)
        said = page.locator("#said").inner_text()
        assert f"{label(int(best))} (" in said
        assert is_shown(percents(said)[0], float(share))
        if position + 1 < len(tokens):
            assert is_shown(percents(said)[1], float(probabilities_TV[position, tokens[position + 1]]))
        page.locator("#waterfall .choices button").first.click()
        *parts, total = map(number, page.locator("#waterfall-bars .value").all_inner_texts())
        # Each number is rounded to two decimals.
        centered = logits_TV[position, best] - logits_TV[position, occurring].mean()
        assert total == pytest.approx(float(centered), abs=0.0051)
        assert sum(parts) == pytest.approx(total, abs=0.0051 * (len(parts) + 1))
        strongest = sorted(parts, key=abs, reverse=True)[:9]
        pushes = map(number, page.locator("#pushes .value").all_inner_texts())
        assert sorted(map(abs, pushes)) == sorted(map(abs, strongest))
        assert page.locator("#sources .token").count() == position + 1
    row_S = cache[names[0]][0, 0, -1]
    for source, title in enumerate(button.get_attribute("title") for button in page.locator("#tokens button").all()):
        assert is_shown(percents(title)[0], float(row_S[source]))


def test_by_keyboard_alone(opened: Any, tokens: list[int], trained_run: Run) -> None:
    page, label = opened(), trained_run.load_tokenizer().label
    page.keyboard.press("Tab")
    assert focused(page)["text"] == "Skip to the explorer"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    reach(page, "tokens")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert focused(page)["text"] == label(tokens[1])
    assert page.locator("#tokens button").nth(1).get_attribute("aria-pressed") == "true"
    reach(page, "looks")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert focused(page)["key"] == "L0H1"
    assert page.locator("#looks button").nth(1).get_attribute("aria-pressed") == "true"
    assert page.locator("#large figcaption").inner_text().startswith("L0H1: ")
    for part in ("thumbnails", "large", "heads", "lens-table", "waterfall", "neuron"):
        reach(page, part)
    while focused(page)["key"] != "after":
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('#neuron') !== null")
    before = page.locator("#neuron h3").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#neuron h3").inner_text() != before
    assert focused(page)["key"] == "after"
    reach(page, "embedding")
    before = page.locator("#map-read").inner_text()
    for key in ("ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        if page.locator("#map-read").inner_text() != before:
            break
    assert page.locator("#map-read").inner_text() != before
    reach(page, "receipts")
    page.keyboard.press("Enter")
    assert page.locator("#receipts table").is_visible()


def focused(page: Any) -> dict[str, str]:
    return page.evaluate("({text: document.activeElement.innerText, key: document.activeElement.dataset.key})")


def reach(page: Any, part: str) -> None:
    """Press Tab until the focus is in a part; a group of buttons is one stop."""
    for _ in range(25):
        page.keyboard.press("Tab")
        if page.evaluate("(id) => document.getElementById(id).contains(document.activeElement)", part):
            return
    pytest.fail(f"Tab does not lead to {part}")


def test_every_button_on_a_phone(opened: Any) -> None:
    """No click causes an error (see the fixture) or a page wider than the window."""
    page = opened(360)
    for group in ("nav", "#looks", "#thumbnails", "#pushes", "#waterfall", "#lens-table", "#neuron"):
        buttons = page.locator(f"{group} {'a' if group == 'nav' else 'button'}")
        assert buttons.count() > 1, group
        for index in range(buttons.count()):
            buttons.nth(index).click()
            assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#receipts summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_contrast_is_that_of_wcag(opened: Any, scheme: str) -> None:
    """At least 7 to 1 for text and 4.5 to 1 for notes (WCAG 2.1, 1.4.6 and 1.4.3), before and after the button."""
    page = opened(scheme=scheme)
    for is_dark in (scheme == "dark", scheme == "light"):
        ink, paper = page.evaluate(COLORS)
        quiet = page.evaluate("getComputedStyle(document.querySelector('.note')).color")
        assert (luminance(paper) < luminance(ink)) == is_dark
        assert contrast(ink, paper) >= 7
        assert contrast(quiet, paper) >= 4.5
        page.locator("#theme").click()


def luminance(color: str) -> float:
    """Relative luminance of `rgb(r, g, b)`: WCAG 2.1."""
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", color)[:3]]
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_hostile_vocabulary_is_text(opened: Any, report_file: Path, tmp_path: Path) -> None:
    """Tokens come from a corpus that anybody may have written."""
    written = report_file.read_text(encoding="utf-8")
    start = written.index(opening := '<script type="application/json" id="data">') + len(opening)
    end = written.index("</script>", start)
    data = json.loads(written[start:end])
    data["labels"] = dict.fromkeys(data["labels"], HARM)
    file = tmp_path / "hostile.html"
    file.write_text(written[:start] + str(htmlsafe_json_dumps(data)) + written[end:], encoding="utf-8")
    page = opened(file=file)
    assert page.locator("#tokens button").first.text_content() == HARM
    page.locator("#text").select_option("1")
    for group, index in product(("#looks", "#thumbnails", "#neuron", "#lens-table", "#waterfall"), (0, 1)):
        page.locator(f"{group} button").nth(index).click()
    assert page.locator("img").count() == 0
    assert page.evaluate("window.harm") is None


def test_the_policy_lets_nothing_out(browser: Any, report_file: Path) -> None:
    """The page's policy would stop even a script in the page from reaching a network."""
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []

    def refuse(route: Any) -> None:
        asked.append(route.request.url)
        route.abort()

    context.route(re.compile("^https?:"), refuse)
    page.goto(report_file.as_uri())
    tried = page.evaluate(
        """async () => {
          const told = [];
          document.addEventListener("securitypolicyviolation", (event) => told.push(event.effectiveDirective));
          await fetch("http://example.invalid/a").catch(() => {});
          await new Promise((done) => {
            const image = new Image();
            image.onerror = done;
            image.src = "http://example.invalid/b.png";
          });
          await new Promise((done) => setTimeout(done, 50));
          return told.sort();
        }"""
    )
    context.close()
    assert tried == ["connect-src", "img-src"]
    assert asked == []
