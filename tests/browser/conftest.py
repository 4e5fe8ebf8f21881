"""A real browser without a network, and a report of the tiny run in it. Without Chromium these tests are skipped."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.persistence.runs import Run

PROMPTS = ("One day a little", "a <b> fox")


@pytest.fixture(scope="session")
def report_file(trained_run: Run, tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> Path:
    """The page of the tiny run, as the command writes it."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    prompts = [option for prompt in PROMPTS for option in ("--prompt", prompt)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMIERE_CACHE_DIR", str(corpus_cache))
        result = CliRunner().invoke(
            app, ["inspect", "report", *prompts, "-o", str(file), "--runs-dir", str(trained_run.path.parent)]
        )
    assert result.exit_code == 0, result.output
    return file


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="make browser installs what drives the browser")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium; apt-get install chromium brings it")
    with playwright.sync_playwright() as driver:
        # Root in a container has no sandbox.
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Watched:
    """A page that fails on every error of a script and on every request but that of the file itself."""

    def __init__(self, browser: Any, file: Path, width: int, scheme: str = "light", scripts: bool = True) -> None:
        self.complaints: list[str] = []
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",  # else the page still glides where the pointer is to go
            offline=True,
            java_script_enabled=scripts,
        )
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self.see)
        self.page.goto(file.as_uri())

    def see(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")) or request.resource_type != "document":
            self.complaints.append(f"a request of {request.url}")


@pytest.fixture
def opened(browser: Any, report_file: Path) -> Iterator[Any]:
    """`opened(width, scheme)`: the report in a new window, whose complaints are none at the end."""
    windows = []

    def open_page(width: int = 1280, scheme: str = "light", scripts: bool = True) -> Any:
        windows.append(Watched(browser, report_file, width, scheme, scripts))
        return windows[-1].page

    yield open_page
    for window in windows:
        window.context.close()
    assert [complaint for window in windows for complaint in window.complaints] == []
