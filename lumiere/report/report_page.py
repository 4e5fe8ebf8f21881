"""The report page: one HTML file with its style, its scripts and its numbers inside, that asks nothing of a network."""

import html
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from lumiere.config.schema import RunConfig
from lumiere.persistence.metrics import History
from lumiere.report.inspection import Inspection
from lumiere.report.page_data import Label, page_data, script_json
from lumiere.report.page_sections import facts_table, head_table, loss_picture, overview, receipt_table

SCRIPTS = ("core.js", "dom.js", "text.js", "attention.js", "lens.js", "parts.js", "neurons.js", "map.js", "main.js")
"""In this order: each uses only what is before it."""


def build_page(
    inspection: Inspection, config: RunConfig, history: History, label: Label, about: Mapping[str, Any]
) -> str:
    """The page as text.

    All that comes from a corpus or a config is escaped where it stands in the HTML, and in the scripts' numbers it is
    plain ASCII; the scripts set it as text only. The page's own policy forbids it to load anything.

    Args:
        history: the run's losses; without any the page says so.
        label: a token as it is printed.
        about: `run`, `checkpoint`, `step`, `source`, `averaged_over`, `seed`, `weights_sha256`.
    """
    return fill(
        asset("template.html"),
        {
            "title": html.escape(f"Inside {about['run']}"),
            "run": html.escape(str(about["run"])),
            "style": asset("style.css"),
            "overview": overview(inspection, config, about),
            "facts": facts_table(inspection, config, about),
            "loss": loss_picture(history),
            "heads": head_table(inspection),
            "averaged_over": html.escape(str(about["averaged_over"])),
            "receipts": receipt_table(inspection),
            "data": script_json(page_data(inspection, label)),
            "script": f'(() => {{\n"use strict";\n{"".join(asset(name) for name in SCRIPTS)}start();\n}})();',
        },
    )


def asset(name: str) -> str:
    return (files("lumiere.report") / "page" / name).read_text(encoding="utf-8")


def fill(template: str, values: Mapping[str, str]) -> str:
    """`{{name}}` replaced, all at once, so that a value is never taken for a template."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
