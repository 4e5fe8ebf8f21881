"""An offline browser with the report of the tiny run. Without Chromium, these tests are skipped."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run
from tests.cli.commands import invoke

PROMPTS = ("One day a little", "a <b> fox")


@pytest.fixture(scope="session")
def report_file(trained_run: Run, tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    prompts = [option for prompt in PROMPTS for option in ("--prompt", prompt)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMIERE_CACHE_DIR", str(corpus_cache))
        invoke("inspect", "report", *prompts, "-o", str(file), "--runs-dir", str(trained_run.path.parent))
    return file


@pytest.fixture
def model(trained_run: Run) -> Transformer:
    return trained_run.load_model()


@pytest.fixture
def tokens(trained_run: Run) -> list[int]:
    return [0, *trained_run.load_tokenizer().encode(PROMPTS[0])]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="make browser installs Playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        # Without a sandbox, which root in a container cannot use.
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, report_file: Path) -> Iterator[Any]:
    """Open the report in a new window; at the end, fail on errors of scripts and on requests but for the page."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def see(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")) or request.resource_type != "document":
            complaints.append(f"request of {request.url}")

    def open_page(width: int = 1280, scheme: str = "light", scripts: bool = True, file: Path = report_file) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",  # otherwise the page scrolls smoothly below the pointer
            offline=True,
            java_script_enabled=scripts,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", see)
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
