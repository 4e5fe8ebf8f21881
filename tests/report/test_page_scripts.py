"""The unit tests of the page's pure functions, in node where it is there; tests/browser runs the same in a browser."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lumiere.report.report_page import asset

UNIT_TESTS = Path(__file__).parent / "page" / "core_test.js"


def test_the_pure_functions_in_node() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node; tests/browser runs the same in a browser")
    script = asset("core.js") + UNIT_TESTS.read_text(encoding="utf-8") + "console.log(JSON.stringify(run()));"
    result = subprocess.run([node, "-e", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
